"""GenEval: the published scorer's answers, the detector's post-processing, colours, and the command line."""

import hashlib
import json
import math
import re
import sys
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmark.geneval.__main__ import OBJECT_NAMES, main
from benchmark.geneval.detect import ColorClassifier, InstanceDetector, crop_objects, find_instances, prepare_image
from benchmark.geneval.detections import (
    Detections,
    decode_mask,
    encode_mask,
    from_record,
    read_json_lines,
    to_record,
)
from benchmark.geneval.evaluate import ExportedDetections, detect_all, find_samples
from benchmark.geneval.export_mmdet import export
from benchmark.geneval.scoring import (
    COLORS,
    ScoringOptions,
    box_colors_needed,
    box_overlap,
    format_summary,
    judge_image,
    partial_credit,
    relative_position,
    select_detections,
    summarize,
    summary_table,
)
from benchmark.geneval.weights import require_color_model, require_detector
from img_gen_grpo_rewards import RewardArguments, build_rewards
from reward_utils.arguments import ScorerArguments
from reward_utils.registry import build_scorers

GOLDEN = Path(__file__).parent / "golden" / "geneval"
CASES = [json.loads(line) for line in (GOLDEN / "cases.jsonl").read_text().splitlines()]
GEOMETRY = json.loads((GOLDEN / "geometry.json").read_text())


def _arguments(case):
    return (case["metadata"], case["detections"], case.get("colors")), case.get("options") or {}


# The published scorer's answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['what']}")
def test_verdict_and_reason_are_those_of_the_published_scorer(case):
    positional, options = _arguments(case)
    assert judge_image(*positional, **options) == (case["expected"]["correct"], case["expected"]["reason"])


def test_kept_rows_and_colour_questions_are_those_of_the_published_scorer():
    for case in CASES:
        (metadata, detections, colors), options = _arguments(case)
        kept = {
            name: np.asarray(detections[name], np.float32)[rows].tolist()
            for name, rows in select_detections(metadata, detections, **options).items()
        }
        assert kept == case["expected"]["kept"], case["what"]
        asked = box_colors_needed(metadata, detections, **options)
        calls = [[name, [colors[name][row] for row in rows]] for name, rows in asked.items()]
        assert calls == (case["expected"]["colour_calls"] or []), case["what"]


def test_relations_and_overlaps_are_those_of_the_published_scorer():
    for pair in GEOMETRY["relative_position"]:
        assert relative_position(pair["a"], pair["b"]) == pair["relations"]
    for pair in GEOMETRY["box_overlap"]:
        assert box_overlap(pair["a"], pair["b"]) == pytest.approx(pair["iou"], abs=1e-9)


def test_summary_prints_what_the_published_program_prints():
    results = [json.loads(line) for line in (GOLDEN / "results.jsonl").read_text().splitlines()]
    expected = json.loads((GOLDEN / "summary.json").read_text())
    summary = summarize(results)
    assert format_summary(summary).split("\n") == expected["stdout"]
    assert summary.overall == pytest.approx(expected["overall"], abs=1e-12)
    assert summary.task_scores == pytest.approx(expected["task_scores"], abs=1e-12)


def test_partial_credit_is_one_exactly_for_correct_images():
    for case in CASES:
        positional, options = _arguments(case)
        credit = partial_credit(*positional, **options)
        assert 0 <= credit <= 1
        assert (credit == 1) == case["expected"]["correct"], case["what"]


def test_partial_credit_worked_by_hand():
    dog = [[0, 0, 10, 10, 0.95], [20, 0, 30, 10, 0.94], [40, 0, 50, 10, 0.93], [60, 0, 70, 10, 0.92]]
    four = {"tag": "counting", "include": [{"class": "dog", "count": 4}], "exclude": [{"class": "dog", "count": 5}]}
    assert [partial_credit(four, {"dog": dog[:found]}) for found in (0, 1, 3, 4)] == [0, 0.25, 0.75, 1]
    two = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    assert [partial_credit(two, {"dog": dog[:found]}) for found in (1, 3, 4)] == [0.5, 0.5, 0]  # too few, too many
    no_cow = {"tag": "two_object", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "cow", "count": 1}]}
    assert partial_credit(no_cow, {"dog": dog, "cow": dog}) == 0.5
    red = {"tag": "color_attr", "include": [{"class": "dog", "count": 2, "color": "red"}, {"class": "cow", "count": 1}]}
    assert partial_credit(red, {"dog": dog[:2]}, {"dog": ["red", "blue"]}) == pytest.approx((1 + 0.5 + 0) / 3)
    right = {"class": "cow", "count": 1, "position": ["right of", 0]}
    beside = {"tag": "position", "include": [{"class": "dog", "count": 1}, right]}
    assert partial_credit(beside, {"dog": dog[:1]}) == pytest.approx((1 + 0 + 0) / 3)


def test_summary_table_has_the_columns_of_the_papers():
    results = [
        {"tag": "colors", "correct": True, "metadata": "a"},
        {"tag": "colors", "correct": False, "metadata": "a"},
        {"tag": "counting", "correct": True, "metadata": "b"},
    ]
    head, _, row = summary_table(summarize(results)).splitlines()
    assert head == "| Overall | single object | two object | counting | colors | position | color attr |"
    assert row == "| 0.75 | - | - | 1.00 | 0.50 | - | - |"


def test_bad_input_is_named():
    red = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    with pytest.raises(ValueError, match=r"no colour for row 0 of 'dog'.*box_colors_needed"):
        judge_image(red, {"dog": [[0, 0, 1, 1, 0.9]]})
    with pytest.raises(ValueError, match=r"shape \[1, 4\], expected \[N, 5\]"):
        judge_image(red, {"dog": [[0, 0, 1, 1]]})
    with pytest.raises(TypeError, match="treshold"):
        judge_image(red, {}, treshold=0.5)
    ahead = {"tag": "position", "include": [{"class": "dog", "count": 1, "position": ["above", 1]}]}
    with pytest.raises(ValueError, match="points to no earlier clause"):
        judge_image(ahead, {"dog": [[0, 0, 1, 1, 0.9]]})
    with pytest.raises(ValueError, match="no result to summarize"):
        summarize([])


# Finding objects ------------------------------------------------------------------------------------------------------

NAMES = ["dog", "bench", "tv remote"]


@pytest.fixture(scope="module")
def tiny_detector(tmp_path_factory):
    """A folder with a random Mask2Former of three classes, in the format of the real one."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,  # group norms have 32 groups
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        id2label={0: "dog", 1: "bench", 2: "remote"},
    )
    folder = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def _picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_instances_score_as_the_library_scores_them():
    # transformers' own post-processing works on 384 x 384, so there the two must agree on scores, classes and masks
    from transformers import Mask2FormerImageProcessor
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

    class_logits, mask_logits = 3 * torch.randn(1, 20, 6), 2 * torch.randn(1, 20, 12, 12)
    outputs = Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=class_logits, masks_queries_logits=mask_logits
    )
    theirs = Mask2FormerImageProcessor().post_process_instance_segmentation(
        outputs, threshold=0.2, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    square = (384, 384)
    sizes = {"padded": square, "resized": square, "original": square}
    labels, boxes, masks = find_instances(class_logits[0], mask_logits[0], min_score=0.2, max_instances=20, **sizes)
    expected = sorted(
        (segment["score"], segment["label_id"], mask)
        for segment, mask in zip(theirs["segments_info"], theirs["segmentation"].bool())
    )[::-1]
    assert len(expected) > 5
    assert labels.tolist() == [label for _, label, _ in expected]
    assert boxes[:, 4].tolist() == pytest.approx([score for score, _, _ in expected], abs=1e-6)
    assert all(torch.equal(mask, other) for mask, (_, _, other) in zip(masks, expected, strict=True))


def test_padding_is_cut_off_and_boxes_are_tight():
    # The model saw 32 x 32, of which the left 16 columns are the resized image; the image itself has 16 x 8 pixels,
    # so that rows 8..15 and columns 0..7 become rows 4..7 and columns 0..3: x1, y1, x2, y2 = 0, 4, 4, 8
    class_logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])  # two objects, one nothing
    mask_logits = torch.full((3, 32, 32), -50.0)
    mask_logits[0, 8:16, :8] = 50.0
    mask_logits[1, :, 16:] = 50.0  # in the padding only
    mask_logits[2] = 50.0
    labels, boxes, masks = find_instances(
        class_logits, mask_logits, padded=(32, 32), resized=(32, 16), original=(16, 8), min_score=0.3
    )
    probability = np.exp(9) / (np.exp(9) + 2)
    assert labels.tolist() == [0]
    assert boxes[0].tolist() == pytest.approx([0, 4, 4, 8, probability], abs=1e-5)
    expected = np.zeros((16, 8), bool)
    expected[4:8, :4] = True
    assert np.array_equal(masks[0].numpy(), expected)


def test_nothing_found_is_an_empty_answer():
    sizes = {"padded": (32, 32), "resized": (32, 32), "original": (20, 10)}
    labels, boxes, masks = find_instances(torch.zeros(5, 3), torch.zeros(5, 8, 8), min_score=0.5, **sizes)
    assert (labels.shape, boxes.shape, masks.shape) == ((0,), (0, 5), (0, 20, 10))


def test_image_is_resized_as_the_official_detector_does():
    # worked by hand: 800 / 300 > 1333 / 1000, so the longer side decides; 300 * 1.333 = 399.9
    assert prepare_image(_picture(1000, 300)).shape == (3, 400, 1333)
    assert prepare_image(_picture(256, 256)).shape == (3, 800, 800)
    # [0, 101] stretched from 2 to 4 pixels, bilinear with half-pixel centres: 0, 25.25, 75.75, 101, in whole levels
    ramp = Image.fromarray(np.array([[[0] * 3, [101] * 3]] * 2, dtype=np.uint8))
    red = prepare_image(ramp, 4, 4)[0] * 58.395 + 123.675
    assert red[0].tolist() == pytest.approx([0, 25, 76, 101], abs=1e-3)


def test_detector_sees_zeros_up_to_a_multiple_of_32(tiny_detector):
    detector = InstanceDetector(NAMES, tiny_detector, short_edge=50, device="cpu")
    seen = []
    detector.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    detector([_picture(40, 20)])
    assert [pixels.shape for pixels in seen] == [(1, 3, 64, 128)]  # 50 x 100 before
    assert seen[0][:, :, 50:].abs().sum() == seen[0][..., 100:].abs().sum() == 0
    assert (seen[0][:, :, :50, :100] != 0).any(dim=1).all()


def test_detector_does_the_same_alone_and_in_a_batch_of_mixed_sizes(tiny_detector):
    detector = InstanceDetector(
        ["dog", "bench", "tv remote"], tiny_detector, min_score=0.0, short_edge=50, device="cpu"
    )
    pictures = [_picture(40, 40), _picture(60, 30, 1), _picture(40, 40, 2)]
    together = detector(pictures)
    assert sum(len(rows) for rows in together[0].boxes.values()) > 3
    for picture, found in zip(pictures, together):
        (alone,) = detector([picture])
        assert set(found.boxes) == set(alone.boxes) <= set(NAMES)
        for name, rows in found.boxes.items():
            np.testing.assert_allclose(rows, alone.boxes[name], atol=1e-4)
            for (x1, y1, x2, y2, _), mask in zip(rows.astype(int), found.masks[name], strict=True):
                assert mask.shape == (picture.height, picture.width)
                assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0


def test_a_detector_of_other_classes_is_refused(tiny_detector):
    with pytest.raises(ValueError, match="has 3 classes, but there are 2 object names"):
        InstanceDetector(["dog", "bench"], tiny_detector, device="cpu")
    with pytest.raises(ValueError, match=r"another order.*'dog', 'bench'"):
        InstanceDetector(["bench", "dog", "tv remote"], tiny_detector, device="cpu")


# Telling colours ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """An open_clip "local-dir:" with a random model that takes 16 pixel images."""
    import open_clip

    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model = open_clip.CLIP(**config)
    for weight in (model.visual.conv1.weight, model.token_embedding.weight, model.positional_embedding):
        weight.data.mul_(30)  # so that pixels and words show in the features
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def test_colours_are_those_of_the_library_s_own_zero_shot_classifier(tiny_clip):
    import open_clip
    from open_clip.zero_shot_classifier import build_zero_shot_classifier_legacy

    model, _, preprocess = open_clip.create_model_and_transforms(tiny_clip)
    templates = ["a photo of a {} dog", "a photo of a {}-colored dog", "a photo of a {} object"]
    tokenizer = open_clip.get_tokenizer(tiny_clip)
    weights = build_zero_shot_classifier_legacy(model.eval(), tokenizer, COLORS, templates)
    picture = Image.fromarray(
        np.kron(np.random.default_rng(3).integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    )
    boxes = np.array([[x, y, x + 16, y + 16, 0.9] for x in range(0, 48, 8) for y in range(0, 48, 8)], np.float32)
    crops = torch.stack([preprocess(picture.crop(tuple(box[:4].tolist()))) for box in boxes])
    with torch.no_grad():
        expected = [COLORS[i] for i in (model.encode_image(crops, normalize=True) @ weights).argmax(1)]
    assert len(set(expected)) > 1
    assert ColorClassifier(tiny_clip, device="cpu")(picture, boxes, [None] * len(boxes), "dog") == expected


def test_crop_shows_the_object_on_the_benchmark_s_grey():
    picture = Image.new("RGB", (10, 8), (200, 0, 0))
    mask = np.zeros((8, 10), bool)
    mask[2:5, 3:6] = True
    mask[2, 3] = False
    masked, plain = crop_objects(picture, np.array([[3, 2, 6, 5, 0.9]] * 2, np.float32), [mask, None])
    assert masked.size == plain.size == (3, 3)
    assert masked.getpixel((0, 0)) == (0x99, 0x99, 0x99)  # "#999"
    assert masked.getpixel((1, 1)) == plain.getpixel((0, 0)) == (200, 0, 0)


# Detections on disk ---------------------------------------------------------------------------------------------------


def test_mask_code_worked_by_hand():
    # columns top to bottom: 0 1 | 1 1 | 0 0: one zero, three ones, two zeros
    mask = np.array([[0, 1, 0], [1, 1, 0]], bool)
    assert encode_mask(mask) == {"size": [2, 3], "counts": [1, 3, 2]}
    assert encode_mask(~mask) == {"size": [2, 3], "counts": [0, 1, 3, 2]}
    for shown in (mask, ~mask, np.ones((3, 2), bool), np.zeros((3, 2), bool)):
        assert np.array_equal(decode_mask(encode_mask(shown)), shown)


def test_detections_survive_the_disk_bit_for_bit():
    rows = np.array([[1.5, 2, 30.25, 40, 0.3], [0, 0, 1, 1, 0.30000004]], np.float32)
    found = Detections({"dog": rows}, {"dog": [np.eye(4, dtype=bool), None]}, {"dog": ["red", None]})
    again = from_record(json.loads(json.dumps(to_record("a.png", "0" * 16, found))))
    assert np.array_equal(again.boxes["dog"], rows) and again.boxes["dog"].dtype == np.float32
    assert np.array_equal(again.masks["dog"][0], np.eye(4)) and again.masks["dog"][1] is None
    assert again.colors == found.colors


def test_malformed_detections_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected finite numbers \[x1, y1, x2, y2, score\]"):
        from_record({"filename": "a", "detections": {"dog": [[1, 2, 3, 4]]}})
    with pytest.raises(ValueError, match="1 colors for 0 rows of 'dog'"):
        from_record({"filename": "a", "detections": {}, "colors": {"dog": ["red"]}})
    with pytest.raises(ValueError, match="add up to 5 pixels, expected 2 x 3"):
        decode_mask({"size": [2, 3], "counts": [1, 4]})
    with pytest.raises(ValueError, match="compressed text"):
        decode_mask({"size": [2, 3], "counts": "06"})
    for record, message in [
        ({}, "a: 'detections' is None, expected an object name -> rows"),
        ({"detections": [[1, 2, 3, 4, 0.5]]}, "a: 'detections' is"),
        ({"detections": {"dog": [[0, 0, 9, 9, math.nan]]}}, "a: 'dog' has rows .*expected finite numbers"),
        ({"detections": {"dog": [[0, 0, 9, 9, "high"]]}}, "a: 'dog' has rows"),
        ({"detections": {"dog": [[0, 0, 9, 9, 0.5]]}, "masks": {"dog": [{"counts": [9]}]}}, "a: a mask is"),
        ({"detections": {"dog": [[0, 0, 9, 9, 0.5]]}, "masks": {"dog": 3}}, "a: no list of masks"),
        ({"detections": {}, "colors": ["red"]}, "a: 'colors' is"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_record({"filename": "a", **record})
    path = tmp_path / "d.jsonl"
    path.write_text('{"filename": "a"}\n{"filename": "b", "det')
    assert read_json_lines(path) == [{"filename": "a"}]  # a stopped run's torn line
    path.write_text('{"file": "a"}\n{"filename": "b"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_json_lines(path)


# The whole way --------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """Two prompts with two images each, in the benchmark's layout."""
    folder = tmp_path / "images"
    prompts = [
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    ]
    for number, prompt in enumerate(prompts):
        (folder / f"{number:05d}" / "samples").mkdir(parents=True)
        (folder / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(prompt) + "\n")
        for sample in range(2):
            picture = _picture(32, 32, 10 * number + sample)
            picture.save(folder / f"{number:05d}" / "samples" / f"{sample:04d}.png")
        _picture(64, 64).save(folder / f"{number:05d}" / "grid.png")
    return folder


DOG = [[2, 3, 20, 30, 0.6], [0, 0, 9, 9, 0.95]]
EXPORTED = [
    {"filename": "00000/samples/0000.png", "detections": {"dog": DOG}, "colors": {"dog": ["blue", "red"]}},
    {"filename": "00000/samples/0001.png", "detections": {"dog": DOG}, "colors": {"dog": ["red", "blue"]}},
    {"filename": "00001/samples/0000.png", "detections": {"bench": [[0, 0, 9, 9, 0.31]]}},
    {"filename": "00001/samples/0001.png", "detections": {"dog": DOG}},
]


def test_exported_detections_are_scored(images, tmp_path, capsys):
    exported = tmp_path / "exported.jsonl"
    exported.write_text("".join(json.dumps(record) + "\n" for record in EXPORTED))
    main([str(images), "--detections", str(exported), "--out", str(tmp_path / "out")])
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["filename"], row["correct"], row["reason"]) for row in results] == [
        ("00000/samples/0000.png", True, ""),
        ("00000/samples/0001.png", False, "expected red dog>=1, found 0 red; and 1 blue"),
        ("00001/samples/0000.png", True, ""),
        ("00001/samples/0001.png", False, "expected bench>=1, found 0"),
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["overall"], summary["correct_prompts"], summary["credit"]) == (0.5, 1.0, 0.625)
    assert "Overall score,0.5" in capsys.readouterr().out
    # other thresholds need no detector: they are applied to what is on disk
    main([str(images), "--detections", str(exported), "--out", str(tmp_path / "out"), "--threshold", "0.5"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["task_scores"]["single_object"] == 0.0


def test_exports_that_would_count_for_nothing_are_refused_or_named(images, tmp_path, capsys, caplog):
    exported, names = tmp_path / "exported.jsonl", tmp_path / "names.txt"
    names.write_text("dog\nbench\n")

    def score(records, out="out"):
        exported.write_text("".join(json.dumps(record) + "\n" for record in records))
        options = ["--detections", str(exported), "--object-names", str(names), "--out", str(tmp_path / out)]
        main([str(images), *options])

    score([{**record, "detections": {**record["detections"], "cat": []}} for record in EXPORTED])  # mmdet's empty class
    assert "Overall score,0.5" in capsys.readouterr().out
    assert "1 kinds of objects that are none of GenEval's (cat)" in caplog.text
    with pytest.raises(SystemExit, match=r"two lines for 00001/samples/0001\.png"):
        score([*EXPORTED, EXPORTED[-1]], "twice")
    mask = {"size": [9, 9], "counts": [81]}
    masked = {**EXPORTED[0], "masks": {"dog": [mask, mask]}}
    with pytest.raises(SystemExit, match=r"a mask of 00000/samples/0000.png is 9 x 9 pixels, the picture 32 x 32"):
        score([masked, *EXPORTED[1:]], "masked")


def test_native_detection_runs_offline_and_goes_on_where_it_stopped(images, tiny_detector, tiny_clip, tmp_path):
    names = tmp_path / "object_names.txt"
    names.write_text("\n".join(NAMES) + "\n")
    detector = ["--detector", str(tiny_detector), "--object-names", str(names), "--color-model", tiny_clip]
    arguments = [str(images), *detector, "--device", "cpu", "--threshold", "0.1"]
    out = images / "geneval"
    main(arguments)
    whole = (out / "results.jsonl").read_text()
    assert len(whole.splitlines()) == 4
    records = read_json_lines(out / "detections.jsonl")
    assert {name for record in records for name in record["detections"]} == set(NAMES)
    assert all("masks" not in record for record in records[2:])  # of a prompt without a colour
    assert [any(record.get("colors", {}).get("dog", [])) for record in records] == [True, True, False, False]
    # drop one image and tear another one's line, as a stopped run would: the same results again
    lines = (out / "detections.jsonl").read_text().splitlines()
    (out / "detections.jsonl").write_text("\n".join([lines[0], lines[3], lines[2][:40]]))
    main(arguments)
    assert (out / "results.jsonl").read_text() == whole
    settings = json.loads((out / "settings.json").read_text())
    assert settings["object_names"] == hashlib.sha256(names.read_bytes()).hexdigest()[:16]  # not the names themselves
    for other, changed in (
        (["--color-model", "another"], rf"made with color_model '{tiny_clip[:48]}', now it is color_model 'another'"),
        (["--detections", str(out / "results.jsonl")], r"object_names '[0-9a-f]{16}', now it is detections '[0-9a-f]"),
    ):
        with pytest.raises(SystemExit, match=f"{changed}.*: choose another --out, or delete that folder$") as stopped:
            main([*arguments, *other])
        assert len(str(stopped.value)) - len(str(out)) < 250


def test_a_changed_image_is_looked_at_again_and_an_unchanged_one_is_not(images, tmp_path):
    samples, out = find_samples(images), tmp_path / "out"
    looked, asked = [], []

    def detector(chosen, pictures):
        looked.extend(sample.filename for sample in chosen)
        assert [picture.size for picture in pictures] == [(32, 32)] * len(chosen)
        boxes = np.array(DOG, np.float32)
        return [Detections({"dog": boxes.copy()}, {"dog": [np.ones((32, 32), bool)] * 2}) for _ in chosen]

    def classifier(picture, boxes, masks, name):
        asked.append((name, boxes[:, 4].tolist(), [mask is not None for mask in masks]))
        return ["red"] * len(boxes)

    models = (lambda: detector, lambda: classifier)
    found = detect_all(samples, out, *models, settings={"detector": "a"}, batch_size=3)
    assert len(looked) == 4
    assert asked == [("dog", [np.float32(0.95)], [True])] * 2  # the best box alone, of the coloured prompt alone
    assert found["00000/samples/0000.png"].colors == {"dog": [None, "red"]}
    _picture(32, 32, 99).save(samples[1].path)
    detect_all(samples, out, *models, settings={"detector": "a"}, batch_size=3)
    assert looked[4:] == ["00000/samples/0001.png"] and len(asked) == 3
    with pytest.raises(ValueError, match=r"made with .*'a'.*now it is .*'b'.*choose another --out"):
        detect_all(samples, out, *models, settings={"detector": "b"})


def test_a_colour_that_a_new_threshold_asks_for_is_told_from_the_mask_on_disk(images, tmp_path):
    samples, out, asked = find_samples(images)[:1], tmp_path / "out", []
    mask = np.eye(32, dtype=bool)

    def detector(chosen, pictures):
        return [Detections({"dog": np.array(DOG, np.float32)}, {"dog": [mask, ~mask]})]

    def classifier(picture, boxes, masks, name):
        asked.extend(masks)
        return ["red"]

    models = (lambda: detector, lambda: classifier)
    detect_all(samples, out, *models, settings={}, options=ScoringOptions(threshold=0.97))
    assert not asked  # no box counts
    found = detect_all(samples, out, None, lambda: classifier, settings={})
    assert len(asked) == 1 and np.array_equal(asked[0], ~mask)
    assert found[samples[0].filename].colors == {"dog": [None, "red"]}
    again = detect_all(samples, out, None, None, settings={})  # now it is on disk
    assert again[samples[0].filename].colors == {"dog": [None, "red"]}


def test_export_from_the_official_environment_is_read_back(images, tmp_path, monkeypatch):
    # mmdet is not installed here: a stand-in gives what `inference_detector` gives, boxes and masks per class
    def inference_detector(model, path):
        boxes = [np.array([[0, 0, 8, 8, 0.9], [0, 0, 4, 4, 0.01]], np.float32), np.zeros((0, 5), np.float32)]
        return boxes, [[np.eye(32, dtype=bool), np.zeros((32, 32), bool)], []]

    apis = types.ModuleType("mmdet.apis")
    apis.inference_detector = inference_detector
    monkeypatch.setitem(sys.modules, "mmdet", types.ModuleType("mmdet"))
    monkeypatch.setitem(sys.modules, "mmdet.apis", apis)
    out = tmp_path / "exported.jsonl"
    assert export(images, out, None, ["dog", "bench"]) == 4
    out.write_text("\n".join(out.read_text().splitlines()[:3]) + '\n{"torn')
    assert export(images, out, None, ["dog", "bench"]) == 1
    samples = find_samples(images)
    found = ExportedDetections(out)(samples, [])
    assert [list(one.boxes) for one in found] == [["dog"]] * 4
    np.testing.assert_array_equal(found[0].boxes["dog"], np.array([[0, 0, 8, 8, 0.9]], np.float32))
    assert np.array_equal(found[0].masks["dog"][0], np.eye(32)) and not found[2].masks  # masks where a colour is asked
    _picture(32, 32, 7).save(samples[0].path)
    with pytest.raises(ValueError, match="has changed since"):
        ExportedDetections(out)(samples, [])


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """No model in the local cache, and a hub that cannot be reached; returns what is asked of it."""
    asked = []

    def unreachable(repository, filename):
        asked.append((repository, filename))
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "file_exists", unreachable)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return asked


@pytest.fixture
def names_file(tmp_path):
    path = tmp_path / "object_names.txt"
    path.write_text("\n".join(NAMES) + "\n")
    return path


def test_a_missing_detector_is_one_line_before_anything_is_written(images, empty_cache, names_file, monkeypatch):
    arguments = [str(images), "--object-names", str(names_file), "--detector", "someone/mask2former"]
    remedy = r"Fetch it with hf download someone/mask2former --local-dir weights/mask2former and pass the folder\.$"
    missing = r"^error: GenEval's detector: someone/mask2former is not in the local cache and "
    with pytest.raises(
        SystemExit, match=missing + r"the hub cannot be asked: Name or service.*\. " + remedy
    ) as stopped:
        main(arguments)
    assert "\n" not in str(stopped.value)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda repository, filename: False)
    with pytest.raises(SystemExit, match=missing + r"the hub has no model\.safetensors or .* " + remedy):
        main(arguments)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=missing + r"HF_HUB_OFFLINE is set\. " + remedy):
        main(arguments)
    (images / "broken").mkdir()
    (images / "broken/config.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"the folder .*broken has no model\.safetensors\. Save or fetch it again"):
        main([*arguments[:-1], str(images / "broken")])
    assert not (images / "geneval").exists()


def test_a_detector_that_cannot_be_fetched_after_all_is_the_same_line(empty_cache, monkeypatch):
    from transformers import Mask2FormerForUniversalSegmentation

    def broken_off(name):
        raise OSError("We couldn't connect\nand more")

    monkeypatch.setattr(huggingface_hub, "file_exists", lambda repository, filename: True)
    monkeypatch.setattr(Mask2FormerForUniversalSegmentation, "from_pretrained", broken_off)
    with pytest.raises(FileNotFoundError, match=r"detector: cannot load a/b \(We couldn't connect\)\. Fetch it with\n"):
        InstanceDetector(NAMES, "a/b", device="cpu")


COLORS_MISSING = (
    r"GenEval's colour model: ViT-L-14-quickgelu \(openai\) is not in the local cache and the hub cannot be asked: .* "
    r"Fetch it with\s+hf download timm/vit_large_patch14_clip_224\.openai --include 'open_clip_\*' --local-dir "
    r"weights/vit_large_patch14_clip_224\.openai\s+and give the weight file in it as the colour weights\.$"
)


def test_a_missing_colour_model_is_one_line_before_the_first_image(images, tiny_detector, empty_cache, names_file):
    arguments = [str(images), "--object-names", str(names_file), "--detector", str(tiny_detector), "--device", "cpu"]
    with pytest.raises(SystemExit, match=f"^error: {COLORS_MISSING}"):
        main(arguments)
    assert empty_cache == [("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors")]
    assert not (images / "geneval").exists()
    for path in (images / "00000/samples").iterdir():  # of the only prompt with a colour
        path.unlink()
    main(arguments)
    assert len(read_json_lines(images / "geneval/detections.jsonl")) == 2


def test_exported_detections_need_the_colour_model_only_where_a_deciding_box_has_no_colour(
    images, tmp_path, empty_cache
):
    exported, out = tmp_path / "exported.jsonl", tmp_path / "out"
    undecided = [{**EXPORTED[0], "colors": {"dog": ["blue", None]}}, *EXPORTED[1:]]  # row 1 is the best
    exported.write_text("".join(json.dumps(record) + "\n" for record in undecided))
    with pytest.raises(SystemExit, match=COLORS_MISSING):
        main([str(images), "--detections", str(exported), "--out", str(out)])
    assert not out.exists()
    decided = [{**EXPORTED[0], "colors": {"dog": [None, "red"]}}, *EXPORTED[1:]]
    exported.write_text("".join(json.dumps(record) + "\n" for record in decided))
    main([str(images), "--detections", str(exported), "--out", str(out)])
    assert len(read_json_lines(out / "detections.jsonl")) == 4


def test_a_colour_model_that_cannot_be_fetched_after_all_is_named_and_other_errors_stay(empty_cache, monkeypatch):
    import open_clip

    monkeypatch.setattr(huggingface_hub, "file_exists", lambda repository, filename: True)
    for error, expected, words in (
        (RuntimeError("Failed to download weights for tag 'openai': gone"), FileNotFoundError, r"\(Failed to .*gone\)"),
        (OSError("disk full"), FileNotFoundError, r"cannot be loaded \(disk full\)\. Fetch it with"),
        (RuntimeError("CUDA out of memory"), RuntimeError, "^CUDA out of memory$"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(open_clip, "create_model_and_transforms", fail)
        with pytest.raises(expected, match=words):
            ColorClassifier(device="cpu")


def test_colour_models_that_are_not_there_are_told_apart(tmp_path, tiny_clip, empty_cache):
    with pytest.raises(ValueError, match=r"'ViT-XXL' is none of open_clip: open_clip\.list_models\(\) names them"):
        require_color_model("ViT-XXL", "openai")
    with pytest.raises(FileNotFoundError, match=r"absent\.pt is no file and no tag .*ViT-L-14-quickgelu: openai"):
        require_color_model("ViT-L-14-quickgelu", str(tmp_path / "absent.pt"))
    with pytest.raises(FileNotFoundError, match=r"hf-hub:a/b is not in .*\n +hf download a/b --local-dir weights/b\n"):
        require_color_model("hf-hub:a/b", None)
    with pytest.raises(FileNotFoundError, match=rf"the folder {tmp_path} lacks weights\. Save or fetch it again"):
        require_color_model(f"local-dir:{tmp_path}", None)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"lacks open_clip_config\.json"):
        require_color_model(f"local-dir:{tmp_path}", None)
    (tmp_path / "weights.pt").touch()
    require_color_model("ViT-L-14-quickgelu", str(tmp_path / "weights.pt"))
    require_color_model(tiny_clip, None)


def test_models_in_the_local_cache_need_no_hub(empty_cache, tmp_path):
    for repository, name in (
        ("someone/mask2former", "model.safetensors"),
        ("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors"),
    ):
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"  # the hub's own layout
        (folder / "snapshots/abc").mkdir(parents=True)
        (folder / "snapshots/abc" / name).touch()
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("abc")
    require_detector("someone/mask2former")
    require_color_model("ViT-L-14-quickgelu", "openai")
    assert empty_cache == []


def test_settings_of_a_run_that_found_nothing_bind_nobody(images, tmp_path):
    exported, out = tmp_path / "exported.jsonl", tmp_path / "out"
    exported.write_text("".join(json.dumps(record) + "\n" for record in EXPORTED))
    out.mkdir()
    (out / "settings.json").write_text('{"detector": "another"}')
    for torn in ("", '{"filename": "00000/sam'):
        (out / "detections.jsonl").write_text(torn)
        main([str(images), "--detections", str(exported), "--out", str(out)])
        assert "detections" in json.loads((out / "settings.json").read_text())
        (out / "settings.json").write_text('{"detector": "another"}')
    with pytest.raises(SystemExit, match="made with detector 'another', now it is "):
        main([str(images), "--detections", str(exported), "--out", str(out)])


def test_a_broken_picture_is_named_before_the_detector_is_loaded(images, tmp_path):
    path = images / "00001/samples/0001.png"
    whole = path.read_bytes()
    for content in (b"", b"no picture", whole[: len(whole) // 2], whole[:60] + b"\0\0" + whole[62:]):
        path.write_bytes(content)
        words = rf"{path} cannot be read as a picture \({len(content)} bytes\): remove it and sample again"
        with pytest.raises(ValueError, match=words):
            detect_all(find_samples(images), tmp_path / "out", pytest.fail, pytest.fail, settings={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "part, clauses, words",
    [
        ("include", [{"class": "dog"}], r"clause 0 of 'include' is \{'class': 'dog'\}; expected \{'class': NAME, 'co"),
        ("exclude", [{"class": "dog", "count": 1}, {"count": 1}], r"clause 1 of 'exclude' is \{'count': 1\}; expected"),
        ("include", [{"class": "dog", "count": "2"}], "clause 0 of 'include'"),
        ("include", ["dog"], "clause 0 of 'include' is dog"),
        ("include", {"class": "dog"}, "'include' is .*, expected a list of clauses"),
        ("include", [{"class": "dog", "count": 1, "position": ["above", 0]}], r"\[RELATION, number of an earlier"),
        ("include", [{"class": "dog", "count": 1, "position": "above"}], "clause 0 of 'include'"),
    ],
)
def test_clauses_that_cannot_be_judged_are_named_before_the_first_image(images, part, clauses, words):
    prompt = {"tag": "counting", "prompt": "a dog", part: clauses}
    (images / "00001/metadata.jsonl").write_text(json.dumps(prompt))
    with pytest.raises(ValueError, match=rf"00001/metadata\.jsonl: .*{words}"):
        find_samples(images)


def test_folders_that_are_not_the_benchmark_s_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match=r"no image under .*expected .*00000/samples/0000\.png"):
        find_samples(tmp_path / "absent")
    (images / "00001" / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"00001/metadata\.jsonl holds \{\}; expected .*'tag'"):
        find_samples(images)
    with pytest.raises(SystemExit, match=r"00001/metadata\.jsonl"):
        main([str(images)])
    with pytest.raises(SystemExit, match="weaker boxes are not kept"):
        main([str(images), "--threshold", "0.01"])


def test_missing_object_names_are_one_line_and_their_default_lies_in_the_project(images, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: .*absent\.txt is no file.*python -m dataset\.fetch geneval"):
        main([str(images), "--object-names", str(tmp_path / "absent.txt")])
    assert Path(__file__).parents[1] / "data/geneval/object_names.txt" == OBJECT_NAMES
    assert not (images / "geneval").exists()


# As a training reward -------------------------------------------------------------------------------------------------


@pytest.fixture
def reward_arguments(tiny_detector, tiny_clip, tmp_path):
    names = tmp_path / "object_names.txt"
    names.write_text("\n".join(NAMES) + "\n")
    return {
        "geneval_detector": str(tiny_detector),
        "geneval_color_model": tiny_clip,
        "geneval_object_names": str(names),
    }


def test_the_reward_is_the_verdict_on_what_the_detector_and_the_classifier_say(reward_arguments, monkeypatch):
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    boxes = {"dog": [[2, 2, 20, 30, 0.97], [22, 4, 36, 30, 0.93]]}
    monkeypatch.setattr(
        InstanceDetector,
        "__call__",
        lambda self, pictures: [Detections({name: np.array(rows) for name, rows in boxes.items()}) for _ in pictures],
    )
    monkeypatch.setattr(ColorClassifier, "__call__", lambda self, image, found, masks, name: ["red"] * len(found))
    one_dog = {"tag": "counting", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 2}]}
    one_dog["prompt"] = "a photo of one dog"
    blue = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "blue"}], "prompt": "a blue dog"}
    expected = {"rewards": [1.0, 0.0], "strict_rewards": [0.0, 0.0], "scores": [0.0, 0.5]}
    for kind, scores in expected.items():
        arguments = ScorerArguments(geneval_score=kind, **reward_arguments)
        judge = build_scorers(["geneval"], arguments)["geneval"]
        judge.check()
        assert judge(images, ["a photo of one dog", "a blue dog"], [one_dog, blue]) == scores, kind


def test_the_reward_sees_what_the_detector_sees(reward_arguments):
    judge = build_scorers(["geneval"], ScorerArguments(**reward_arguments))["geneval"]
    pictures = [_picture(40, 40), _picture(40, 40, 1)]
    images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])
    wanted = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    found = InstanceDetector(NAMES, reward_arguments["geneval_detector"], device="cpu")(pictures)
    expected = [float(judge_image(wanted, detections.boxes)[0]) for detections in found]
    assert judge(images, ["a photo of a dog"] * 2, [wanted] * 2) == expected
    seen = judge.network.detect(pictures)
    for detections, other in zip(found, seen, strict=True):
        assert set(detections.boxes) == set(other.boxes)
        for name, rows in detections.boxes.items():
            np.testing.assert_allclose(other.boxes[name], rows, atol=1e-4)


def test_the_reward_without_object_names_says_how_to_get_them(reward_arguments, tmp_path):
    missing = {**reward_arguments, "geneval_object_names": str(tmp_path / "absent.txt")}
    judge = build_scorers(["geneval"], ScorerArguments(**missing))["geneval"]
    with pytest.raises(FileNotFoundError, match=r"absent\.txt is no file.*python -m dataset\.fetch geneval"):
        judge.check()


def test_everything_the_reward_lacks_is_named_beside_a_server_that_does_not_answer(tmp_path, empty_cache):
    arguments = RewardArguments(
        geneval_object_names=str(tmp_path / "absent.txt"),
        geneval_detector="someone/mask2former",
        deqa_url="http://127.0.0.1:9/",
        server_retries=0,
    )
    with pytest.raises(FileNotFoundError) as missing:
        build_rewards(["geneval", "deqa"], arguments=arguments)
    text = str(missing.value)
    assert re.search(r"absent\.txt is no file.*python -m dataset\.fetch geneval", text)
    assert "GenEval's detector: someone/mask2former is not in the local cache" in text
    assert re.search(COLORS_MISSING.removesuffix("$"), text)
    assert "127.0.0.1:9" in text
