"""Class labels as prompts: names against the published lists, draws against their probabilities, errors by advice."""

from __future__ import annotations

import numpy as np
import pytest

from dataset.labels import count_class_images, label_dataset, load_class_names

NAMES = ["red circle", "blue square", "green star"]


def test_curated_names_tell_apart_the_classes_that_share_a_wordnet_name():
    # both are plain "crane" in WordNet; 134 is the bird (n02012849), 517 the machine (n03126707)
    names = load_class_names("imagenet")
    assert len(names) == 1000
    assert (names[0], names[134], names[517], names[999]) == (
        "tench",
        "crane bird",
        "construction crane",
        "toilet paper",
    )


def test_wordnet_names_keep_all_synonyms_in_sorted_folder_order():
    # the published lines of n01440764, n01443537, n02012849, n03126707, n15075141
    names = load_class_names("imagenet_wordnet")
    assert len(names) == 1000
    assert names[:2] == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert (names[134], names[517], names[999]) == ("crane", "crane", "toilet tissue, toilet paper, bathroom tissue")


def test_names_from_a_file_are_its_lines(tmp_path):
    (tmp_path / "names.txt").write_text("red circle\n  café table \n", encoding="utf-8")
    assert load_class_names(tmp_path / "names.txt") == ["red circle", "café table"]


def test_an_empty_line_would_shift_the_labels_and_is_refused_with_its_number(tmp_path):
    (tmp_path / "names.txt").write_text("a\n\nb\n")
    with pytest.raises(ValueError, match="line 2 is empty"):
        load_class_names(tmp_path / "names.txt")


def test_an_unknown_name_set_lists_the_known_ones():
    with pytest.raises(ValueError, match="imagenet, imagenet_wordnet"):
        load_class_names("imagenet21k")


def test_rows_are_prompt_text_label_and_caption():
    rows = label_dataset(50, 3, NAMES, seed=1)
    assert rows.column_names == ["prompt", "label", "caption"]
    assert len(rows) == 50
    for row in rows:
        assert row["prompt"] == str(row["label"])
        assert row["caption"] == f"a photo of {NAMES[row['label']]}"


def test_the_seed_fixes_the_labels():
    first, again, other = (label_dataset(200, 3, NAMES, seed=s)["label"] for s in (7, 7, 8))
    assert list(first) == list(again)
    assert list(first) != list(other)


def test_labels_are_uniform_unless_frequencies_are_given():
    # standard deviation of a count: sqrt(30000 * 1/3 * 2/3) = 82 (uniform), at most that with weights; bound: 5 of them
    uniform = np.bincount(label_dataset(30_000, 3, NAMES, seed=0)["label"], minlength=3)
    assert np.abs(uniform - 10_000).max() < 5 * 82
    weighted = np.bincount(label_dataset(30_000, 3, NAMES, seed=0, frequencies=[1, 0, 5])["label"], minlength=3)
    assert weighted[1] == 0
    assert abs(weighted[0] - 5_000) < 5 * 65  # sqrt(30000 * 1/6 * 5/6) = 64.5


def test_images_are_counted_by_sorted_folder_and_never_opened(tmp_path):
    for name, count in {"n02": 1, "n01": 3}.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "train" / name / f"{name}_{i}.JPEG").touch()  # empty files: opening one as an image would fail
    (tmp_path / "train" / "n01" / "notes.txt").touch()
    assert count_class_images(tmp_path, 2) == [3, 1]
    assert count_class_images(tmp_path / "train", 2) == [3, 1]


def test_a_wrong_number_of_class_folders_is_named(tmp_path):
    for name in ("n01", "n02", "n03"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"3 class folders \(n01 ... n03\), but the policy has 1000"):
        count_class_images(tmp_path, 1000)


def test_an_empty_class_folder_is_named(tmp_path):
    for name in ("n01", "n02"):
        (tmp_path / name).mkdir()
    (tmp_path / "n01" / "a.jpg").touch()
    with pytest.raises(ValueError, match="n02 holds no image"):
        count_class_images(tmp_path, 2)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"num_prompts": 0}, "at least 1"),
        ({"num_classes": 4}, "--class_names FILE"),
        ({"frequencies": [1, 2]}, r"shape \(2,\)"),
        ({"frequencies": [1, -1, 1]}, "none negative"),
        ({"frequencies": [0, 0, 0]}, "not all zero"),
    ],
)
def test_contradicting_arguments_are_refused(arguments, advice):
    with pytest.raises(ValueError, match=advice):
        label_dataset(**{"num_prompts": 5, "num_classes": 3, "class_names": NAMES, "seed": 0, **arguments})
