"""Evaluation metrics against OpenAI's own numbers, hand-worked examples and slow loops; archives; networks."""

import io
import itertools
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import fid_evaluation
from benchmark.archives import ImageArchive, write_images
from benchmark.fid import inception
from benchmark.fid.features import Features, load_features
from benchmark.fid.graph_def import read_float_constants
from fid_evaluation import (
    SquaredDistances,
    evaluate,
    frechet_distance,
    inception_score,
    neighbour_radii,
    precision_recall,
)

ADM = np.load(Path(__file__).parent / "golden" / "adm_metrics.npz")
FLOAT16_ROWS = 4  # rows by which counts may differ in float16, see golden/README_adm.md


def golden(key: str) -> np.ndarray:
    return ADM[key].astype(np.float32)


def gaussian(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


# ---- Frechet distance ------------------------------------------------------------------------------------------------


def test_frechet_distance_of_shifted_scaled_gaussians():
    # |(3, 4)|^2 + tr(I + 4 I - 2 * 2 I) = 25 + 2, worked by hand
    assert frechet_distance([0, 0], np.eye(2), [3, 4], 4 * np.eye(2)) == pytest.approx(27.0)


def test_frechet_distance_of_crossed_singular_gaussians():
    # each varies along its own axis only: S1 S2 = 0, so tr(S1) + tr(S2) = 9 + 16 is left
    assert frechet_distance([0, 0], np.diag([9, 0]), [0, 0], np.diag([0, 16])) == pytest.approx(25.0)


def test_frechet_distance_of_correlated_gaussians():
    # S = [[5, 4], [4, 5]] has the eigenvalues 9 and 1, so tr((S I)^1/2) = 3 + 1 and tr(S) + tr(I) - 2 * 4 = 4
    assert frechet_distance([0, 0], [[5, 4], [4, 5]], [0, 0], np.eye(2)) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("expected", "reference", "generated", "rows", "scale"),
    [
        ("a_fid", "a_ref_pool", "a_gen_pool", (None, None), 1),
        ("a_sfid", "a_ref_spatial", "a_gen_spatial", (None, None), 1),
        ("b_fid", "a_ref_pool", "a_gen_pool", (None, None), 64),
        ("e_fid", "a_ref_pool", "a_gen_pool", (int(ADM["e_nref"]), int(ADM["e_ngen"])), 1),
    ],
)
def test_frechet_distance_equals_the_official_number(expected, reference, generated, rows, scale):
    first = gaussian(golden(reference)[: rows[0]] * scale)
    second = gaussian(golden(generated)[: rows[1]] * scale)
    assert frechet_distance(*first, *second) == pytest.approx(float(ADM[expected]), rel=1e-5)


def test_frechet_distance_to_itself_is_zero_and_official_statistics_are_ours():
    mean, covariance = ADM["a_ref_mu"], ADM["a_ref_sigma"]
    streamed = fid_evaluation._Moments()
    for rows in np.array_split(golden("a_ref_pool"), 7):
        streamed.add(rows)
        streamed._update()  # as if every batch were large
    np.testing.assert_allclose(streamed.statistics().mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(streamed.statistics().covariance, covariance, rtol=1e-9, atol=1e-9)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 0], np.eye(2), [0, 0, 0], np.eye(3)), "same features"),
        (([0, 0], np.eye(3), [0, 0], np.eye(2)), r"expected \[D\]"),
        (([0, np.nan], np.eye(2), [0, 0], np.eye(2)), "NaN"),
        (([0, 0], [[1, 0.5], [0, 1]], [0, 0], np.eye(2)), "not symmetric"),
    ],
)
def test_frechet_distance_refuses_what_is_no_gaussian(arguments, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


# ---- Inception Score -------------------------------------------------------------------------------------------------


def test_uniform_predictor_scores_1_and_balanced_one_hot_predictor_scores_the_number_of_classes():
    assert inception_score(np.zeros((60, 10))) == pytest.approx(1.0)
    labels = np.arange(60) % 10
    with pytest.raises(ValueError, match="row of -infinity"):
        inception_score(np.array([[0.0, 1.0], [-np.inf, -np.inf]]))
    for off in (-1e4, -np.inf):  # a probability of exactly 0 is no NaN
        assert inception_score(np.where(np.eye(10)[labels] > 0, 0.0, off)) == pytest.approx(10.0)


def test_inception_score_of_two_soft_rows():
    # p = (3/4, 1/4) and (1/4, 3/4), mean (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2) for both rows
    logits = np.log([[3, 1], [1, 3]])
    assert inception_score(logits) == pytest.approx(np.exp(0.75 * np.log(1.5) + 0.25 * np.log(0.5)))


def test_splits_are_taken_in_file_order_and_a_short_last_one_counts_like_the_others():
    one_hot = 1e4 * np.eye(2)
    # rows 0 0 | 1 1 | 0: each split sees one class; in the order 0 1 | 0 1 | 0 the splits score 2, 2 and 1
    assert inception_score(one_hot[[0, 0, 1, 1, 0]], split_size=2) == pytest.approx(1.0)
    assert inception_score(one_hot[[0, 1, 0, 1, 0]], split_size=2) == pytest.approx(5 / 3)


@pytest.mark.parametrize("split_size", [5000, 64, 50])
def test_inception_score_equals_the_official_number(split_size):
    logits = golden("g_pool") @ golden("g_w")
    np.testing.assert_allclose(logits, ADM["g_logits"], rtol=1e-4, atol=1e-4)
    assert inception_score(logits, split_size) == pytest.approx(float(ADM[f"g_is_split{split_size}"]), rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "split_size"),
    [(np.zeros((0, 3)), 5), (np.zeros(3), 5), (np.full((2, 3), np.nan), 5), (np.zeros((2, 3)), 0)],
)
def test_inception_score_refuses_what_is_no_prediction(logits, split_size):
    with pytest.raises(ValueError, match="logits"):
        inception_score(logits, split_size)


# ---- precision and recall --------------------------------------------------------------------------------------------


def scaled_c() -> tuple[np.ndarray, np.ndarray]:
    reference, generated = golden("a_ref_pool"), golden("a_gen_pool")
    reference[: int(ADM["c_ref_scale_rows"])] *= 64
    generated[: int(ADM["c_gen_scale_rows"])] *= 64
    return reference, generated


def copied_d(scale: float) -> tuple[np.ndarray, np.ndarray]:
    reference, generated = golden("a_ref_pool"), golden("a_gen_pool")
    generated[: int(ADM["d_copied"])] = reference[: int(ADM["d_copied"])]
    return reference * scale, generated * scale


def pair(name: str, scale: float = 1) -> tuple[np.ndarray, np.ndarray]:
    return golden(f"{name}_ref_pool") * scale, golden(f"{name}_gen_pool") * scale


@pytest.mark.parametrize(
    ("tag", "sets", "block_size"),
    [
        ("b_fp32", pair("a", 64), 10_000),
        ("b_fp32_blocks", pair("a", 64), 61),
        ("c_mixed_oneblock", scaled_c(), 10_000),
        ("d_fp32", copied_d(64), 10_000),
        ("f_fp32", pair("f", 64), 10_000),
    ],
)
def test_precision_and_recall_equal_the_official_counts_where_float16_overflows(tag, sets, block_size):
    for distances in ("float16", "float32"):
        precision, recall = precision_recall(*sets, distances=distances, block_size=block_size)
        assert precision == pytest.approx(float(ADM[f"{tag}_precision"]), abs=1e-12)
        assert recall == pytest.approx(float(ADM[f"{tag}_recall"]), abs=1e-12)


@pytest.mark.parametrize(
    ("tag", "sets", "block_size"),
    [
        ("a_fp16", pair("a"), 10_000),
        ("c_mixed_blocks", scaled_c(), int(ADM["c_block"])),
        ("d_fp16", copied_d(1), 10_000),
        ("f_fp16", pair("f"), 10_000),
    ],
)
def test_float16_precision_and_recall_are_within_a_few_rows_of_the_official_counts(tag, sets, block_size):
    precision, recall = precision_recall(*sets, distances="float16", block_size=block_size)
    assert abs(precision - float(ADM[f"{tag}_precision"])) * len(sets[1]) <= FLOAT16_ROWS + 1e-6
    assert abs(recall - float(ADM[f"{tag}_recall"])) * len(sets[0]) <= FLOAT16_ROWS + 1e-6


@pytest.mark.parametrize(
    ("tag", "sets", "tolerance"),
    [("a_fp16", pair("a"), 3e-2), ("b_fp32", pair("a", 64), 1e-5), ("f_fp32", pair("f", 64), 1e-5)],
)
def test_radii_equal_the_official_ones(tag, sets, tolerance):
    for name, features in zip(("ref", "gen"), sets):
        radii = neighbour_radii(torch.from_numpy(features), 3, SquaredDistances("float16"), block_size=100)
        np.testing.assert_allclose(radii, ADM[f"{tag}_{name}_radii"], rtol=tolerance)


def test_overflowing_blocks_are_counted():
    distances = SquaredDistances("float16")
    distances(torch.full((2, 4), 1.0), torch.full((3, 4), 2.0))
    assert distances.num_overflowed == 0
    # 4 * 200^2 = 160,000 is beyond float16's 65,504; the distance 4 * 199^2 comes from float32
    assert distances(torch.full((2, 4), 1.0), torch.full((3, 4), 200.0)).unique().tolist() == [4 * 199.0**2]
    assert distances.num_overflowed == 1


def test_a_product_that_overflows_alone_stays_in_float16_as_in_the_official_code():
    # tf.maximum comes before tf.is_finite: 200^2 - 2 * 200 * 190 + 190^2 = 100, but -76,000 is -infinity, and then 0
    distances = SquaredDistances("float16")
    rows, columns = torch.tensor([[200.0, 0.0]]), torch.tensor([[190.0, 0.0]])
    assert distances(rows, columns).item() == 0.0 and distances.num_overflowed == 0
    assert SquaredDistances("float32")(rows, columns).item() == 100.0


def test_float32_precision_and_recall_equal_a_plain_loop():
    rng = np.random.default_rng(1)
    reference, generated = rng.normal(size=(23, 5)), rng.normal(0.5, 1.2, size=(31, 5))

    def share_inside(points, centres):
        radii = [sorted(((c - other) ** 2).sum() for other in centres)[3] for c in centres]
        return np.mean([any(((p - c) ** 2).sum() <= r for c, r in zip(centres, radii)) for p in points])

    expected = share_inside(generated, reference), share_inside(reference, generated)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    for block_size in (7, 10_000):
        assert precision_recall(reference, generated, distances="float32", block_size=block_size) == expected


def test_precision_and_recall_worked_by_hand():
    # reference 0 1 2 3: squared radii to the 3rd neighbour 9 4 4 9. generated -3 1.5 5 9: inside only if within 3 of 0
    # or 3, or within 2 of 1 or 2: -3 (border counts), 1.5 and 5, not 9. generated radii: from -3: 4.5 8 12 -> 144;
    # from 1.5: 3.5 4.5 7.5; every reference row is inside a ball.
    reference, generated = np.array([[0.0], [1], [2], [3]]), np.array([[-3.0], [1.5], [5], [9]])
    for distances in ("float16", "float32"):
        assert precision_recall(reference, generated, distances=distances) == (0.75, 1.0)


def test_mode_collapse_has_high_precision_and_low_recall():
    rng = np.random.default_rng(0)
    modes = 20 * np.eye(10)
    reference = np.repeat(modes, 30, axis=0) + rng.normal(0, 1, (300, 10))
    collapsed = modes[0] + rng.normal(0, 0.5, (300, 10))  # one of ten modes, and its dense middle only
    precision, recall = precision_recall(reference, collapsed, distances="float32")
    assert precision > 0.95
    assert recall < 0.1
    assert precision_recall(collapsed, reference, distances="float32") == (recall, precision)  # the roles exchanged


@pytest.mark.parametrize("distances", ["float16", "float32"])
def test_a_set_covers_itself(distances):
    assert precision_recall(golden("a_ref_pool"), golden("a_ref_pool"), distances=distances) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ((np.zeros((3, 2)), np.zeros((9, 2))), {}, "more than k = 3 rows"),
        ((np.zeros((9, 2)), np.zeros((9, 3))), {}, "same network"),
        ((np.zeros((9, 2)), np.full((9, 2), np.inf)), {}, "NaN or infinity"),
        ((np.zeros((9, 2)), np.zeros((9, 2))), {"distances": "float64"}, "float16, float32"),
    ],
)
def test_precision_and_recall_refuse_bad_sets(sets, options, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(*sets, **options)


# ---- archives --------------------------------------------------------------------------------------------------------


def random_images(num_images: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_images, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_is_read_in_slices_of_the_asked_size_whether_stored_or_deflated(tmp_path, save):
    images = random_images(10)
    save(tmp_path / "images.npz", images)
    archive = ImageArchive(tmp_path / "images.npz")
    batches = list(archive.batches(4))
    assert archive.shape == (10, 8, 8)
    assert [batch.shape for batch in batches] == [(4, 8, 8, 3), (4, 8, 8, 3), (2, 8, 8, 3)]
    assert np.array_equal(np.concatenate(batches), images)


def test_reading_and_writing_hold_a_few_slices_and_never_the_array(tmp_path):
    size, num_images, batch_size = 32, 2000, 10
    image_bytes = size * size * 3
    write = itertools.repeat(np.zeros((size, size, 3), np.uint8), num_images)
    tracemalloc.start()
    write_images(tmp_path / "zeros.npz", (num_images, size, size), write)
    most = max(batch.nbytes for batch in ImageArchive(tmp_path / "zeros.npz").batches(batch_size))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most == batch_size * image_bytes
    assert peak < num_images * image_bytes / 4  # 6.1 MB in all; a slice of 31 kB and zipfile's own buffers


def test_a_written_archive_is_what_numpy_reads_and_has_the_same_bytes_each_time(tmp_path):
    images = random_images(3)
    for name in ("first.npz", "second.npz"):
        write_images(tmp_path / name, (3, 8, 8), iter(images))
    assert np.array_equal(np.load(tmp_path / "first.npz")["arr_0"], images)
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()


@pytest.mark.parametrize("images", [random_images(2), random_images(4), random_images(3, size=4)])
def test_a_failed_write_leaves_the_old_file(tmp_path, images):
    path = tmp_path / "images.npz"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"images came|expected uint8"):
        write_images(path, (3, 8, 8), iter(images))
    assert [entry.name for entry in tmp_path.iterdir()] == ["images.npz"]
    assert path.read_bytes() == b"old"


def save_with(tmp_path, **arrays) -> Path:
    np.savez(tmp_path / "bad.npz", **arrays)
    return tmp_path / "bad.npz"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": random_images(4).astype(np.float32)}, "float32"),
        ({"arr_0": random_images(4)[..., 0]}, r"uint8 \[4, 8, 8\]"),
        ({"arr_0": random_images(4).transpose(0, 3, 1, 2)}, r"uint8 \[4, 3, 8, 8\]"),
        ({"arr_0": random_images(1)}, "at least 2"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "object"),
        ({"arr_0": np.asfortranarray(random_images(4))}, "ascontiguousarray"),
        ({"images": random_images(4)}, "holds images"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu .* NaN"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"sigma \[4, 4\]"),
        ({"arr_0": random_images(4), "mu": np.zeros(3)}, "holds mu alone: statistics are mu and sigma"),
        ({"mu": np.array([None, 1]), "sigma": np.eye(2)}, "its mu is no array of numbers"),
    ],
)
def test_bad_archives_say_what_is_wrong(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        ImageArchive(save_with(tmp_path, **arrays))


def test_a_missing_a_foreign_and_a_cut_file_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        ImageArchive(tmp_path / "none.npz")
    (tmp_path / "page.npz").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"no whole \.npz"):
        ImageArchive(tmp_path / "page.npz")
    whole = save_with(tmp_path, arr_0=random_images(50)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:2000])
    with pytest.raises(ValueError, match=r"no whole \.npz"):
        ImageArchive(tmp_path / "cut.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (9, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    with pytest.raises(ValueError, match="cut short"):
        ImageArchive(tmp_path / "short.npz")
    cut_header = header.getvalue()[:8] + (20).to_bytes(2, "little") + header.getvalue()[10:30]
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as archive:
        archive.writestr("arr_0.npy", cut_header + bytes(100))
    with pytest.raises(ValueError, match=r"header\.npz: its arr_0 is no \.npy array"):
        ImageArchive(tmp_path / "header.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pixels_that_do_not_match_their_checksum_are_refused(tmp_path, save):
    path = tmp_path / "damaged.npz"
    save(path, random_images(50))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 16] ^= 1  # of the checksum in the zip's directory
    path.write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        list(ImageArchive(path).batches(8))


# ---- the whole evaluation, on features one can see through -----------------------------------------------------------


class CornerFeatures:
    """pool: the first two pixels; spatial: the next one; logits: a fixed linear map of the pool."""

    key = "inception"
    name = "corners"
    no_logits = ""

    def __call__(self, images):
        flat = torch.from_numpy(images).flatten(1).float() / 255
        pool = flat[:, :6]
        return Features(pool, flat[:, 6:9], pool @ torch.linspace(-6, 6, 30).view(6, 5))


def test_evaluation_equals_the_metrics_of_all_features_at_once(tmp_path):
    real, fake = random_images(40, seed=1), random_images(50, seed=2) // 2
    np.savez(tmp_path / "real.npz", real)
    np.savez_compressed(tmp_path / "fake.npz", fake)
    result = evaluate(tmp_path / "real.npz", tmp_path / "fake.npz", CornerFeatures(), batch_size=7)
    real_features, fake_features = CornerFeatures()(real), CornerFeatures()(fake)
    assert result["fid"] == pytest.approx(
        frechet_distance(*gaussian(real_features.pool.numpy()), *gaussian(fake_features.pool.numpy())), rel=1e-6
    )
    assert result["sfid"] == pytest.approx(
        frechet_distance(*gaussian(real_features.spatial.numpy()), *gaussian(fake_features.spatial.numpy())), rel=1e-6
    )
    assert result["inception_score"] == pytest.approx(inception_score(fake_features.logits))
    assert (result["precision"], result["recall"]) == precision_recall(real_features.pool, fake_features.pool)
    assert result["notes"] == {}
    report = fid_evaluation.format_report(result)
    for expected in ("corners", "float16, k = 3", "50 images, 8 x 8", "splits of 5000"):
        assert expected in report


@pytest.mark.parametrize("distances", ["float16", "float32"])
def test_the_order_of_the_rows_changes_nothing_within_one_split(tmp_path, distances):
    real, fake = random_images(40, seed=1), random_images(50, seed=2) // 2
    results = []
    for number, order in enumerate((np.arange(50), np.random.default_rng(3).permutation(50))):
        np.savez(tmp_path / f"real{number}.npz", real[order[order < 40]])
        np.savez(tmp_path / f"fake{number}.npz", fake[order])
        paths = tmp_path / f"real{number}.npz", tmp_path / f"fake{number}.npz"
        result = evaluate(*paths, CornerFeatures(), distances=distances, batch_size=16)
        results.append([result[key] for key in ("fid", "sfid", "inception_score", "precision", "recall")])
    assert results[0] == pytest.approx(results[1], rel=1e-9)


def test_identical_files_have_distance_0_and_cover_each_other(tmp_path):
    path = save_with(tmp_path, arr_0=random_images(30))
    result = evaluate(path, path, CornerFeatures())
    assert result["fid"] == pytest.approx(0, abs=1e-9) and result["sfid"] == pytest.approx(0, abs=1e-9)
    assert (result["precision"], result["recall"]) == (1.0, 1.0)


def test_statistics_stored_in_the_reference_are_used_and_reported(tmp_path):
    fake = random_images(50, seed=2)
    np.savez(tmp_path / "fake.npz", fake)
    stored = {"mu": np.full(6, 0.5), "sigma": np.eye(6), "mu_s": np.zeros(3), "sigma_s": np.eye(3) * 2}
    np.savez(tmp_path / "real.npz", arr_0=random_images(40), **stored)
    np.savez(tmp_path / "only.npz", **stored)
    features = CornerFeatures()(fake)
    fid = frechet_distance(stored["mu"], stored["sigma"], *gaussian(features.pool.numpy()))
    sfid = frechet_distance(stored["mu_s"], stored["sigma_s"], *gaussian(features.spatial.numpy()))
    for name in ("real.npz", "only.npz"):
        result = evaluate(tmp_path / name, tmp_path / "fake.npz", CornerFeatures())
        assert (result["fid"], result["sfid"]) == pytest.approx((fid, sfid), rel=1e-6)
        assert "stored statistics for FID and sFID" in fid_evaluation.format_report(result)
    assert result["precision"] is None and "only.npz has 0" in result["notes"]["precision"]


def test_statistics_of_another_network_are_refused_before_the_long_part(tmp_path):
    np.savez(tmp_path / "fake.npz", random_images(9))
    np.savez(tmp_path / "real.npz", arr_0=random_images(9), mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="5 dimensions, but this network has 6"):
        evaluate(tmp_path / "real.npz", tmp_path / "fake.npz", CornerFeatures())


def test_two_images_give_what_two_images_can_give(tmp_path):
    result = evaluate(*[save_with(tmp_path, arr_0=random_images(2))] * 2, CornerFeatures())
    assert result["fid"] == pytest.approx(0, abs=1e-9)
    assert result["precision"] is None and "more than 3 images" in result["notes"]["recall"]


def test_files_that_do_not_fit_each_other_are_refused(tmp_path):
    np.savez(tmp_path / "small.npz", random_images(5, size=8))
    np.savez(tmp_path / "large.npz", random_images(5, size=12))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(ValueError, match=r"8 x 8 pixels, .* 12 x 12"):
        evaluate(tmp_path / "small.npz", tmp_path / "large.npz", CornerFeatures())
    with pytest.raises(ValueError, match="have to be images"):
        evaluate(tmp_path / "small.npz", tmp_path / "statistics.npz", CornerFeatures())


def test_features_with_nan_name_the_images(tmp_path):
    class Broken(CornerFeatures):
        def __call__(self, images):
            features = super().__call__(images)
            features.pool[images[:, 0, 0, 0] == 255] = np.nan
            return features

    images = random_images(9) // 2
    images[5, 0, 0, 0] = 255
    path = save_with(tmp_path, arr_0=images)
    with pytest.raises(ValueError, match="images 4 to 7 hold NaN"):
        evaluate(path, path, Broken(), batch_size=4)


# ---- the Inception network -------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: "bytes | int") -> bytes:
    """One protobuf field: wire type 0 for an int, 2 for bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor_proto(array: np.ndarray, encoding: str = "content") -> bytes:
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    data = array.astype("<f4").tobytes()
    values = {
        "content": lambda: field(4, data),
        "packed": lambda: field(5, data),
        "unpacked": lambda: b"".join(varint(5 << 3 | 5) + data[i : i + 4] for i in range(0, len(data), 4)),
        "one": lambda: field(5, struct.pack("<f", array.flat[0])),
    }[encoding]()
    return field(1, 1) + field(2, shape) + values


def const_node(name: str, tensor: bytes) -> bytes:
    def attr(key: str, value: bytes) -> bytes:
        return field(5, field(1, key.encode()) + field(2, value))

    # attributes before and after, as TensorFlow writes a map in any order
    return field(
        1,
        field(1, name.encode())
        + field(2, b"Const")
        + field(4, b"/cpu:0")
        + attr("dtype", field(6, 1))
        + attr("value", field(8, tensor)),
    )


def other_nodes() -> bytes:
    """What a graph has besides: an operation with inputs, an int32 constant, the versions of the producer."""
    multiply = field(1, field(1, b"Mul") + field(2, b"Mul") + field(3, b"Sub") + field(3, b"Mul/y"))
    integer = field(1, 3) + field(2, b"") + field(7, varint(299))
    return multiply + const_node("ResizeBilinear/size", integer) + field(4, field(1, 9))


def test_constants_of_a_graph_are_read_in_every_encoding(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3) - 2.5
    nodes = [const_node(name, tensor_proto(array, name)) for name in ("content", "packed", "unpacked")]
    nodes.append(const_node("one", tensor_proto(np.full((2, 2), 7.0), "one")))
    nodes.append(const_node("scalar", tensor_proto(np.array(0.5))))
    (tmp_path / "graph.pb").write_bytes(other_nodes() + b"".join(nodes))
    constants = read_float_constants(tmp_path / "graph.pb")
    assert set(constants) == {"content", "packed", "unpacked", "one", "scalar"}
    for name in ("content", "packed", "unpacked"):
        assert np.array_equal(constants[name], array)
    assert np.array_equal(constants["one"], np.full((2, 2), 7.0))
    assert constants["scalar"].shape == () and constants["scalar"] == 0.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<html>not found</html>", "no TensorFlow GraphDef"),
        (const_node("a", tensor_proto(np.zeros(9)))[:-5], "cut short"),
        (const_node("a", field(1, 1) + field(2, field(2, field(1, 3))) + field(4, bytes(8))), "2 values for its shape"),
    ],
)
def test_what_is_no_graph_is_refused(tmp_path, data, message):
    (tmp_path / "graph.pb").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_float_constants(tmp_path / "graph.pb")


# Port -> graph for one layer of each kind of block, as torch-fidelity's conversion script pairs them.
KNOWN_NAMES = {
    "Conv2d_1a_3x3": "conv",
    "Conv2d_4a_3x3": "conv_4",
    "Mixed_5b.branch3x3dbl_3": "mixed/tower_1/conv_2",
    "Mixed_5d.branch5x5_2": "mixed_2/tower/conv_1",
    "Mixed_6a.branch3x3": "mixed_3/conv",
    "Mixed_6a.branch3x3dbl_2": "mixed_3/tower/conv_1",
    "Mixed_6d.branch1x1": "mixed_6/conv",
    "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
    "Mixed_6b.branch7x7_1": "mixed_4/tower/conv",
    "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
    "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
    "Mixed_7b.branch3x3_2a": "mixed_9/tower/mixed/conv",
    "Mixed_7c.branch3x3dbl_3b": "mixed_10/tower_1/mixed/conv_1",
    "Mixed_7c.branch3x3dbl_2": "mixed_10/tower_1/conv_1",
    "Mixed_7c.branch_pool": "mixed_10/tower_2/conv",
}


def test_layer_names_are_those_of_the_graph():
    names = inception.layer_names()
    assert len(names) == len(set(names.values())) == 94
    assert {ours: names[ours] for ours in KNOWN_NAMES} == KNOWN_NAMES


@pytest.fixture(scope="module")
def inception_files(tmp_path_factory) -> dict[str, Path]:
    """Random weights in both file formats, and the network they come from."""
    torch.manual_seed(0)

    class RandomInception(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = RandomInception("random", ["2048", "logits_unbiased"], empty)
    for name, tensor in network.state_dict().items():
        if name.endswith(("bn.weight", "bn.running_var")):
            tensor.uniform_(1.0, 2.0)
        elif name.endswith(("bn.bias", "bn.running_mean")):
            tensor.normal_(0.0, 0.1)
    state = network.state_dict()
    folder = tmp_path_factory.mktemp("inception")
    torch.save(state, folder / "random.pth")
    with (folder / "random.pb").open("wb") as graph:
        graph.write(other_nodes())
        graph.write(const_node("softmax/weights", tensor_proto(state["fc.weight"].T.numpy())))
        graph.write(const_node("softmax/biases", tensor_proto(state["fc.bias"].numpy())))
        for ours, theirs in inception.layer_names().items():
            kernel = state[f"{ours}.conv.weight"].permute(2, 3, 1, 0).numpy()  # OIHW -> HWIO
            graph.write(const_node(f"{theirs}/conv2d_params", tensor_proto(kernel)))
            for part, name in inception.NORM_PARTS.items():
                graph.write(const_node(f"{theirs}/batchnorm/{name}", tensor_proto(state[f"{ours}.bn.{part}"].numpy())))
    return {"pth": folder / "random.pth", "pb": folder / "random.pb", "network": network}


def test_both_weight_files_give_the_network_they_were_made_from(inception_files):
    expected = inception_files["network"].state_dict()
    for kind in ("pth", "pb"):
        state = inception.load_network(inception_files[kind]).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_inception_features_are_pool_first_channels_of_mixed_6_and_logits_without_bias(inception_files):
    features = load_features("inception", inception_files["pth"], any_weights=True)
    whole = {}
    features.network.Mixed_6d.register_forward_hook(lambda module, inputs, output: whole.update(map=output))
    images = random_images(2, size=20)
    pool, spatial, logits = features(images)
    assert pool.shape == (2, 2048) and spatial.shape == (2, 17 * 17 * 7) and logits.shape == (2, 1008)
    # the concatenated block begins with the same channels; height, width, channel
    assert torch.equal(spatial.view(2, 17, 17, 7), whole["map"].permute(0, 2, 3, 1)[..., :7])
    torch.testing.assert_close(logits, pool @ features.network.fc.weight.T)


@pytest.mark.parametrize("name", ["h_up", "h_256", "h_down"])
def test_resizing_inside_the_network_equals_tensorflow(inception_files, name):
    network, resized = inception_files["network"], {}

    class Enough(Exception):
        pass

    def keep(module, inputs):
        resized["pixels"] = inputs[0]
        raise Enough

    hook = network.Conv2d_1a_3x3.register_forward_pre_hook(keep)
    with pytest.raises(Enough):
        network(torch.from_numpy(ADM[f"{name}_in"]).permute(0, 3, 1, 2))
    hook.remove()
    every_11th = resized["pixels"][:, :, ::11, ::11].permute(0, 2, 3, 1)
    np.testing.assert_allclose(every_11th, ADM[f"{name}_out_s11"], atol=1e-5)


def test_unpublished_weights_are_refused_unless_asked_for_and_then_named(inception_files):
    for kind in ("pth", "pb"):
        with pytest.raises(ValueError, match="--any_weights"):
            load_features("inception", inception_files[kind])
    assert "NOT the published weights" in load_features("inception", inception_files["pth"], any_weights=True).name


def test_weights_are_looked_for_by_path_variable_and_cache_and_the_error_says_how_to_fetch_them(tmp_path, monkeypatch):
    monkeypatch.delenv("INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=r"curl -L .*weights-inception-2015-12-05-6726825d.pth"):
        inception.find_weights()
    for name in (inception.GRAPH_NAME, *reversed(inception.CONVERTED_NAMES)):  # what is preferred comes last
        path = tmp_path / "hub" / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert inception.find_weights() == path
    (tmp_path / "mine.pth").touch()
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(tmp_path / "mine.pth"))
    assert inception.find_weights() == tmp_path / "mine.pth"
    with pytest.raises(FileNotFoundError, match=r"other\.pth"):
        inception.find_weights(tmp_path / "other.pth")


def test_broken_weight_files_are_refused(tmp_path, inception_files):
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="no PyTorch weights file"):
        inception.load_network(tmp_path / "page.pth")
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="does not fit Inception"):
        inception.load_network(tmp_path / "part.pth")
    torch.save({"fc.bias": torch.full((1008,), np.nan)}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="NaN"):
        inception.load_network(tmp_path / "nan.pth")
    (tmp_path / "other.pb").write_bytes(other_nodes())
    with pytest.raises(ValueError, match="no constant softmax/weights"):
        inception.load_network(tmp_path / "other.pb")


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"fc.bias": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="no PyTorch weights file"):
        inception.load_network(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_command_line_errors_are_one_line_before_any_network_is_loaded(tmp_path):
    np.savez(tmp_path / "real.npz", random_images(4, size=16))
    np.savez(tmp_path / "fake.npz", random_images(4, size=8))
    with pytest.raises(SystemExit, match=r"error: .* 16 x 16"):
        fid_evaluation.main([str(tmp_path / "real.npz"), str(tmp_path / "fake.npz"), "--weights", "none.pth"])
    pair_of_files = [str(tmp_path / "fake.npz"), str(tmp_path / "fake.npz")]
    with pytest.raises(SystemExit, match="error: --device nonsense: it takes cuda"):
        fid_evaluation.main([*pair_of_files, "--device", "nonsense"])
    with pytest.raises(SystemExit, match="is a folder: give the file to write"):
        fid_evaluation.main([*pair_of_files, "--json", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: --json .*out\.json cannot be written .*: give another file"):
        fid_evaluation.main([*pair_of_files, "--json", str(tmp_path / "real.npz/out.json")])


# ---- other networks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A random CLIP of 8 x 8 patches with its preprocessing and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<pad>", "<unk>", "a", "photo", "of", "red", "blue", "disc", "square", "<end>"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 10, "max_position_embeddings": 8, "eos_token_id": 9, "pad_token_id": 0},
        vision_config={**sizes, "image_size": 32, "patch_size": 4},
        projection_dim=16,
    )
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 9)])
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", model_max_length=8
    ).save_pretrained(folder)
    return folder


def test_clip_features_are_the_projected_embedding_patch_tokens_and_zero_shot_logits(clip_folder):
    from transformers import CLIPImageProcessor, CLIPModel

    images = random_images(3, size=32)
    names = ["red disc", "blue square", "red square", "blue disc"]
    pool, spatial, logits = load_features(str(clip_folder), class_names=names)(images)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(list(images), return_tensors="pt")["pixel_values"]
    token_ids = {"red": 5, "blue": 6, "disc": 7, "square": 8}
    texts = torch.tensor([[2, 3, 4, *(token_ids[word] for word in name.split()), 9] for name in names])
    with torch.no_grad():
        whole = model(input_ids=texts, pixel_values=pixels)
        projected = model.visual_projection(model.vision_model(pixels).pooler_output)
        tokens = model.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(pool, projected)
    torch.testing.assert_close(logits, whole.logits_per_image)
    # 64 patch tokens after the class token, row by row
    torch.testing.assert_close(spatial.view(3, 8, 8, 7)[:, 2, 5], tokens[:, 1 + 2 * 8 + 5, :7])


def test_command_line_prints_a_table_and_writes_the_same_numbers(tmp_path, clip_folder, capsys):
    np.savez(tmp_path / "real.npz", random_images(4, size=32, seed=1))
    np.savez(tmp_path / "fake.npz", random_images(4, size=32, seed=2))
    paths = [str(tmp_path / "real.npz"), str(tmp_path / "fake.npz")]
    (tmp_path / "names.txt").write_text("red disc\nblue square\n")
    features = ["--features", str(clip_folder), "--class_names", str(tmp_path / "names.txt")]
    numbers_file = tmp_path / "out" / "numbers.json"
    fid_evaluation.main([*paths, *features, "--json", str(numbers_file), "--distances", "float32"])
    numbers = json.loads(numbers_file.read_text())
    table = capsys.readouterr().out
    for key, title in {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score", "recall": "Recall"}.items():
        assert f"{title:<16}{numbers[key]:>10.4f}" in table
    assert "zero-shot over 2 classes" in numbers["features"]
    assert numbers["distances"] == "float32" and "float32, k = 3" in table
    assert numbers["reference"]["num_images"] == 4 and numbers["samples"]["image_size"] == [32, 32]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["numbers.json"]


def test_evaluation_with_a_clip_says_so_and_says_what_it_lacks(tmp_path, clip_folder, capsys):
    np.savez(tmp_path / "real.npz", arr_0=random_images(6, size=32, seed=1), mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "fake.npz", random_images(6, size=32, seed=2))
    command = [str(tmp_path / "real.npz"), str(tmp_path / "fake.npz"), "--features", str(clip_folder)]
    fid_evaluation.main(command)
    table = capsys.readouterr().out
    assert f"CLIPModel of {clip_folder}, 16 dimensions" in table
    assert "needs --class_names FILE" in table
    assert "stored statistics" not in table  # they are Inception's


def test_a_classifier_brings_its_logits_and_a_backbone_does_without(tmp_path):
    from transformers import (
        ConvNextImageProcessor,
        ResNetConfig,
        ResNetModel,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    network = load_features(str(tmp_path))
    pool, spatial, logits = network(random_images(2))
    assert pool.shape == (2, 16) and spatial.shape == (2, 16 * 7) and logits.shape == (2, 5)
    assert network.no_logits == ""

    ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ).save_pretrained(tmp_path / "resnet")
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(tmp_path / "resnet")
    network = load_features(str(tmp_path / "resnet"))
    pool, spatial, logits = network(random_images(2))
    assert pool.shape == (2, 12) and spatial.shape[1] % 7 == 0 and logits is None
    assert network.no_logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "no/such/folder"}, "no Hugging Face image model"),
        ({"features": "inception", "class_names": ["a"]}, "--class_names goes with a CLIP"),
        ({"features": "no/such/folder", "weights": "inception.pth"}, "brings its own weights"),
    ],
)
def test_features_that_cannot_be_had_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_features(**options)
