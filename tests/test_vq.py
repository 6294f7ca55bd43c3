"""The image tokenizer agrees with recorded outputs of the official one, keeps its ranges, and can be trained."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import GOLDEN
from llamagen import VQConfig, VQModel, vq

FLOAT_BOUND = 2e-5  # the golden README's bound for tokenizer floats; they were recorded in float32
CASES = [("vq_a", "sq"), ("vq_a", "rect"), ("vq_b", "sq")]


def golden_config(name: str) -> VQConfig:
    official = json.loads((GOLDEN / name / "config.json").read_text())["model"]
    return VQConfig(
        codebook_size=official["codebook_size"],
        codebook_embed_dim=official["codebook_embed_dim"],
        base_channels=official["ch"],
        encoder_channel_multipliers=official["encoder_ch_mult"],
        decoder_channel_multipliers=official["decoder_ch_mult"],
        z_channels=official["z_channels"],
    )


@pytest.fixture(scope="module")
def golden_vq():
    """`golden_vq(name)`: model and recorded arrays of a folder."""
    loaded = {}

    def load(name: str):
        if name not in loaded:
            weights = load_file(GOLDEN / name / "weights.safetensors")
            model = VQModel.from_official(weights, golden_config(name))
            loaded[name] = model, load_file(GOLDEN / name / "io.safetensors")
        return loaded[name]

    return load


@pytest.fixture
def small_vq():
    """Two levels, random weights: 2 x 2 pixels a code."""
    return VQModel(VQConfig(64, 4, 32, (1, 1), (1, 1), 8)).eval()


def close(ours, recorded):
    torch.testing.assert_close(ours, recorded, atol=FLOAT_BOUND, rtol=0)


# Against the official tokenizer


@pytest.mark.parametrize(("name", "case"), CASES)
def test_encoder_features_and_codes_are_the_recorded_ones(golden_vq, name, case):
    model, io = golden_vq(name)
    images = io[f"{case}.images"]
    with torch.no_grad():
        features = model.encode_features(images)
    quantized, ids = model.quantize(features)
    close(features, io[f"{case}.pre_quant"])
    close(quantized, io[f"{case}.quant"])
    assert torch.equal(ids.flatten(), io[f"{case}.indices"])
    assert torch.equal(model.encode(images), ids)
    assert ids.dtype == torch.int64 and ids.shape == (len(images), features.shape[-2] * features.shape[-1])


@pytest.mark.parametrize(("name", "case"), CASES)
def test_decoded_pixels_are_the_recorded_ones(golden_vq, name, case):
    model, io = golden_vq(name)
    grid = tuple(io[f"{case}.pre_quant"].shape[-2:])
    encoded = io[f"{case}.indices"].view(len(io[f"{case}.images"]), -1)
    close(model.decode_raw(encoded, grid), io[f"{case}.recon"])
    close(model.decode_raw(io[f"{case}.codes"], grid), io[f"{case}.pixels"])
    close(model.decode(io[f"{case}.codes"], grid), ((io[f"{case}.pixels"] + 1) / 2).clamp(0, 1))


@pytest.mark.parametrize("name", ["vq_a", "vq_b"])
def test_codes_are_normalised_on_lookup(golden_vq, name):
    model, io = golden_vq(name)
    close(model.quantize.unit_codes()[:16], io["codebook.entries_first16"])
    assert (model.quantize.embedding.weight.norm(dim=1) - 1).abs().max() > 0.1  # the stored rows are not


@pytest.mark.parametrize(("name", "case"), CASES)
def test_training_pass_reconstructs_what_decode_does(golden_vq, name, case):
    model, io = golden_vq(name)
    with torch.no_grad():
        output = model(io[f"{case}.images"])
    close(output.reconstruction, io[f"{case}.recon"])
    assert torch.equal(output.ids.flatten(), io[f"{case}.indices"])


@pytest.mark.parametrize(("name", "factor"), [("VQ-16", 16), ("VQ-8", 8)])
def test_presets_have_the_released_names_and_shapes(name, factor):
    manifest = json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = VQModel(VQConfig.preset(name))
    expected = {key: shape for key, shape, kind in manifest["state_dict"] if kind == "parameter"}
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["n_parameters"]
    assert model.config.downsample_factor == factor == manifest["downsample"]


# Files


def test_official_file_survives_reading_and_writing(golden_vq, tmp_path):
    model, _ = golden_vq("vq_a")
    model.save_official(tmp_path / "vq.pt")
    written = torch.load(tmp_path / "vq.pt", weights_only=True)
    original = load_file(GOLDEN / "vq_a/weights.safetensors")
    assert list(written) == ["model"] and written["model"].keys() == original.keys()
    assert all(torch.equal(written["model"][key], tensor) for key, tensor in original.items())
    assert [path.name for path in tmp_path.iterdir()] == ["vq.pt"]  # nothing half-written beside it


def test_folder_survives_writing_and_reading(small_vq, tmp_path):
    small_vq.save_pretrained(tmp_path / "vq")
    again = VQModel.from_pretrained(tmp_path / "vq")
    assert again.config == small_vq.config and not again.training
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in small_vq.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "vq").iterdir()) == ["config.json", "model.safetensors"]


def test_loaded_weights_are_a_copy(golden_vq):
    weights = load_file(GOLDEN / "vq_a/weights.safetensors")
    model = VQModel.from_official(weights, golden_config("vq_a"))
    weights["decoder.conv_out.bias"].fill_(100.0)
    weights["quantize.codebook_used"].fill_(100.0)
    assert model.decoder.conv_out.bias.max() < 100 and model.quantize.codebook_used.max() < 100


def test_folders_of_something_else_are_refused(small_vq, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json.*checkpoints convert"):
        VQModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llamagen"}')
    with pytest.raises(ValueError, match="model_type 'llamagen', but that of a tokenizer is 'llamagen_vq'"):
        VQModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llamagen_vq", "dropout": 0.1}')
    with pytest.raises(ValueError, match="does not know: dropout"):
        VQModel.from_pretrained(tmp_path)
    small_vq.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        VQModel.from_pretrained(tmp_path)
    small_vq.save_pretrained(tmp_path)
    VQConfig(32, 4, 32, (1, 1), (1, 1), 8).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"quantize\.embedding\.weight \[64, 4\] for \[32, 4\].*64 codes.*configuration.*32 codes"
    ):
        VQModel.from_pretrained(tmp_path)


# Decoding and encoding


def test_grid_is_square_by_default_and_rows_come_first(small_vq):
    ids = torch.arange(8).view(1, 8)
    assert torch.equal(small_vq.decode(ids[:, :4]), small_vq.decode(ids[:, :4], (2, 2)))
    assert small_vq.decode(ids, (2, 4)).shape == (1, 3, 4, 8)
    grid = small_vq.quantize.lookup(ids, (2, 4))  # [1, E, 2, 4]
    assert torch.equal(grid[0, :, 1, 2], small_vq.quantize.unit_codes()[6])  # row 1, column 2 of 4: code 1 * 4 + 2


def test_decode_is_the_clamped_half_of_decode_raw(small_vq):
    with torch.no_grad():
        small_vq.decoder.conv_out.weight.mul_(20)  # reach beyond [-1, 1]
    ids = torch.randint(64, (2, 16))
    raw, images = small_vq.decode_raw(ids), small_vq.decode(ids)
    assert raw.min() < -1 and raw.max() > 1 and images.dtype == torch.float32
    assert torch.equal(images, ((raw + 1) * 0.5).clamp(0, 1))


def test_chunks_bound_the_images_at_once_and_change_nothing(small_vq, monkeypatch):
    ids = torch.randint(64, (5, 4))
    images = small_vq.decode(ids) * 2 - 1
    sizes = []
    handles = [
        part.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
        for part in (small_vq.decoder, small_vq.encoder)
    ]
    monkeypatch.setattr(vq, "PIXELS_PER_CHUNK", 2 * 4 * 4 + 1)  # two images of 4 x 4 pixels, not three
    by_rule, by_three, encoded = small_vq.decode(ids), small_vq.decode(ids, batch_size=3), small_vq.encode(images)
    assert sizes == [2, 2, 1, 3, 2, 2, 2, 1]  # decoded by rule, decoded by three, encoded by rule
    monkeypatch.setattr(vq, "PIXELS_PER_CHUNK", 1)  # an image larger than the bound still goes through, alone
    small_vq.decode(ids[:2])
    assert sizes[-2:] == [1, 1]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(by_rule, (images + 1) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_three, (images + 1) / 2, atol=1e-5, rtol=0)
    assert torch.equal(encoded, small_vq.encode(images, batch_size=5))


def test_autocast_around_it_changes_nothing(small_vq):
    ids = torch.randint(64, (2, 16))
    images = small_vq.decode(ids) * 2 - 1
    codes = small_vq.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(small_vq.decode(ids) * 2 - 1, images)
        assert torch.equal(small_vq.encode(images), codes)
        assert small_vq(images).codebook_loss.dtype == torch.float32


def test_half_precision_weights_are_refused(small_vq):
    with pytest.raises(ValueError, match=r"cast to torch.bfloat16.*call .float\(\)"):
        small_vq.bfloat16().decode(torch.zeros(1, 4, dtype=torch.long))


def test_first_of_equally_near_codes_is_taken(small_vq):
    with torch.no_grad():
        codes = small_vq.quantize.embedding.weight
        codes[9:20] = codes[7]
        assert small_vq.quantize(0.3 * codes[7].view(1, 4, 1, 1))[1].tolist() == [[7]]


@pytest.mark.parametrize(
    ("ids", "grid_size", "message"),
    [
        (torch.full((1, 4), 64), None, r"ids span 64\.\.64.*has 0\.\.63"),
        (torch.full((1, 4), -1), None, r"ids span -1\.\.-1"),
        (torch.zeros(1, 6, dtype=torch.long), None, r"6 codes an image.*give grid_size=\(h, w\)"),
        (torch.zeros(1, 6, dtype=torch.long), (2, 2), r"do not fill a grid of 2 x 2"),
        (torch.zeros(1, 6, dtype=torch.long), (-2, -3), r"do not fill a grid of -2 x -3"),
        (torch.zeros(4, dtype=torch.long), None, r"ids are \[4\]"),
        (torch.zeros(0, 4, dtype=torch.long), None, r"ids are \[0, 4\]"),
        (torch.zeros(1, 4), None, r"torch.float32, expected integers"),
        (torch.zeros(1, 4, dtype=torch.bool), None, r"torch.bool, expected integers"),
    ],
)
def test_codes_that_cannot_be_decoded_are_refused(small_vq, ids, grid_size, message):
    with pytest.raises(ValueError, match=message):
        small_vq.decode(ids, grid_size)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 4, 4), 1.1), r"span \[1.1, 1.1\], expected \[-1, 1\]"),
        (torch.full((1, 3, 4, 4), -2.0), r"span \[-2, -2\]"),
        (torch.full((1, 3, 4, 4), math.nan), r"span \[nan, nan\]"),
        (torch.zeros(1, 3, 4, 5), r"4 x 5 pixels, but one code covers 2 x 2.*multiples of 2"),
        (torch.zeros(3, 4, 4), r"images are \[3, 4, 4\]"),
        (torch.zeros(1, 1, 4, 4), r"images are \[1, 1, 4, 4\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"torch.uint8, expected floats"),
        (torch.zeros(0, 3, 4, 4), "no images"),
    ],
)
def test_images_that_cannot_be_encoded_are_refused(small_vq, images, message):
    with pytest.raises(ValueError, match=message):
        small_vq.encode(images)


def test_empty_chunks_are_refused(small_vq):
    with pytest.raises(ValueError, match="batch_size is 0"):
        small_vq.decode(torch.zeros(1, 4, dtype=torch.long), batch_size=0)


# Configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_channels": 48}, r"base_channels 48 times multiplier 1 is 48 channels, no multiple of 32"),
        ({"encoder_channel_multipliers": (0, 1), "decoder_channel_multipliers": (1, 1)}, "multiplier 0 is 0 channels"),
        ({"encoder_channel_multipliers": (1, 1)}, "2 encoder and 5 decoder multipliers"),
        ({"encoder_channel_multipliers": (), "decoder_channel_multipliers": ()}, "0 encoder and 0 decoder"),
        ({"codebook_size": 0}, "codebook_size is 0"),
    ],
)
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VQConfig(**settings)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="'VQ-4': take one of VQ-16, VQ-8"):
        VQConfig.preset("VQ-4")


# Training


def test_gradient_passes_straight_through_the_codebook(small_vq):
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    weight = torch.randn(1, 4, 2, 2)
    quantized, _ = small_vq.quantize(features)
    (quantized * weight).sum().backward()
    unit = features.detach() / features.detach().norm(dim=1, keepdim=True)
    # the gradient of z / |z| alone: (w - u (u . w)) / |z|, whatever code was chosen
    expected = (weight - unit * (unit * weight).sum(1, keepdim=True)) / features.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(features.grad, expected)
    assert small_vq.quantize.embedding.weight.grad is None


def test_codebook_losses_follow_their_definition(small_vq):
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    output = small_vq(images, commitment_weight=0.5, entropy_weight=0.1)
    with torch.no_grad():
        features = small_vq.encode_features(images).permute(0, 2, 3, 1).reshape(-1, 4).double()
        unit = features / features.norm(dim=1, keepdim=True)
        codes = small_vq.quantize.embedding.weight.double()
        codes = codes / codes.norm(dim=1, keepdim=True)
        distances = torch.cdist(unit, codes).square()
        nearest = distances.argmin(1)
        error = ((codes[nearest] - unit) ** 2).mean().item()
    assert output.ids.flatten().tolist() == nearest.tolist()
    assert output.codebook_loss.item() == pytest.approx(error, rel=1e-4)
    assert output.commitment_loss.item() == pytest.approx(0.5 * error, rel=1e-4)
    p = torch.softmax(-distances / 0.01, dim=1)
    entropy = -(p * p.clamp_min(1e-300).log()).sum(1).mean() + (p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    assert output.entropy_loss.item() == pytest.approx(0.1 * entropy.item(), rel=1e-3)


def test_codebook_loss_moves_codes_and_commitment_moves_the_encoder(small_vq):
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    codes, encoder = small_vq.quantize.embedding.weight, small_vq.encoder.conv_in.weight
    output = small_vq(images)
    assert output.entropy_loss.item() == 0  # off by default, as for the released tokenizers
    output.codebook_loss.backward(retain_graph=True)
    assert codes.grad.abs().sum() > 0 and encoder.grad is None
    codes.grad = None
    output.commitment_loss.backward()
    assert codes.grad is None and encoder.grad.abs().sum() > 0


def test_entropy_loss_of_sharp_and_of_undecided_choices():
    sharp = torch.eye(4) * 10  # four features, each sure of another of four codes: 0 - log 4
    assert vq.usage_entropy_loss(sharp).item() == pytest.approx(-math.log(4), abs=1e-4)
    collapsed = torch.eye(4)[:1].repeat(4, 1) * 10  # all sure of the same code: 0 - 0
    assert vq.usage_entropy_loss(collapsed).item() == pytest.approx(0, abs=1e-4)
    undecided = torch.zeros(4, 4)  # each as undecided as the average: log 4 - log 4
    assert vq.usage_entropy_loss(undecided).item() == pytest.approx(0, abs=1e-4)


def test_a_few_steps_of_training_improve_the_reconstruction(small_vq):
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0], images[1, 2] = 1.0, -1.0
    optimizer = torch.optim.Adam(small_vq.parameters(), lr=2e-3)
    errors = []
    for _ in range(12):
        output = small_vq(images)
        error = F.mse_loss(output.reconstruction, images)
        optimizer.zero_grad()
        (error + output.codebook_loss + output.commitment_loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]
