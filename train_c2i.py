"""Class-to-image GRPO: parse, build, train. `python train_c2i.py --config configs/c2i_B_256.yaml`"""

from dataclasses import dataclass, field

from dataset.labels import count_class_images, label_dataset, load_class_names
from experiment import build_trainer, errors_in_one_line, parse, run


@dataclass
class ClassArguments:
    """Which classes are asked for, and what they are called."""

    class_names: str = field(
        default="imagenet",
        metadata={
            "help": "Names that the rewards read: imagenet (curated by CLIP's authors), imagenet_wordnet (whole "
            "synonym strings, as in the released code), or a file with one name a line."
        },
    )
    image_folder: str | None = field(
        default=None,
        metadata={
            "help": "Draw classes as often as this ImageNet train/ folder has them (no image is read); unset: "
            "uniformly."
        },
    )


def main() -> None:
    with errors_in_one_line():
        classes, policy, rewards, config, model = parse([ClassArguments], __doc__)

    def make_dataset(num_prompts, policy_config):
        frequencies = None
        if classes.image_folder is not None:
            frequencies = count_class_images(classes.image_folder, policy_config.num_classes)
        names = load_class_names(classes.class_names)
        return label_dataset(num_prompts, policy_config.num_classes, names, config.seed, frequencies)

    with errors_in_one_line():
        trainer = build_trainer("c2i", make_dataset, policy, rewards, config, model)
    run(trainer, classes, policy, rewards, config, model)


if __name__ == "__main__":
    main()
