"""Speed and memory of our paths beside plain ones, as ratios from one run."""
