"""DrawBench and other folders of images, scored by the paper's evaluation metrics; see docs/drawbench.md."""
