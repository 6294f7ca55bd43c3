"""Convert weights between official files, AR-GRPO folders and Hugging Face folders."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llamagen.configuration import GPT_SIZES, IMAGE_SIZES, TASKS, LlamaGenConfig
from llamagen.modeling import LlamaGenForCausalLM
from llamagen.vq import CONFIG_NAME, MODEL_TYPE, VQ_PRESETS, VQConfig, VQModel


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `convert` (official file or AR-GRPO folder to Hugging Face folder) or `export` (back to an official file)."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "convert":
            done = convert(options.source, options.target, read_config(options))
        else:
            done = export(options.source, options.target)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(done + "\n")


def convert(source: Path, folder: Path, config: LlamaGenConfig | VQConfig) -> str:
    """Write an official file, or the part of an AR-GRPO folder that `config` describes, as a Hugging Face folder."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file, but a folder with config and weights is to be written: name another")
    model_class = VQModel if isinstance(config, VQConfig) else LlamaGenForCausalLM
    model = model_class.from_official(source, config)
    model.save_pretrained(folder)
    return f"{source} -> {folder}: {_summary(model)}"


def export(folder: Path, file: Path) -> str:
    """Write a Hugging Face folder of a policy or a tokenizer as an official .pt file."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder, but one file is to be written: name it, such as {file / 'model.pt'}")
    model_type = _model_type(folder)
    model = VQModel.from_pretrained(folder) if model_type == MODEL_TYPE else LlamaGenForCausalLM.from_saved(folder)
    model.save_official(file)
    return f"{folder} -> {file}: {_summary(model)}"


def read_config(options: argparse.Namespace) -> LlamaGenConfig | VQConfig:
    """Configuration that the options name: a released model, or the config.json of a folder."""
    if options.config is not None:
        config_class = VQConfig if _model_type(options.config) == MODEL_TYPE else LlamaGenConfig
        return config_class.from_pretrained(options.config)
    if options.model in VQ_PRESETS:
        return VQConfig.preset(options.model)
    if options.task is None or options.image_size is None:
        raise ValueError(
            f"{options.model} needs --task and --image_size, as its file's name tells them: c2i_B_256.pt is "
            "--model GPT-B --task c2i --image_size 256"
        )
    return LlamaGenConfig.preset(options.model, task=options.task, image_size=options.image_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llamagen.checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    convert_parser = commands.add_parser("convert", help="official file or AR-GRPO folder -> Hugging Face folder")
    convert_parser.add_argument("source", type=Path, help=".pt, .pth, .bin, .safetensors, or a folder with safetensors")
    convert_parser.add_argument("target", type=Path, help="folder to write")
    which = convert_parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", choices=[*GPT_SIZES, *VQ_PRESETS], help="released model that the weights are of")
    which.add_argument("--config", type=Path, help="folder with the config.json of any other model")
    convert_parser.add_argument("--task", choices=TASKS, help="of a transformer: class labels or text")
    convert_parser.add_argument("--image_size", type=int, choices=IMAGE_SIZES, help="of a transformer, in pixels")

    export_parser = commands.add_parser("export", help="Hugging Face folder -> official file")
    export_parser.add_argument("source", type=Path, help="folder written by save_pretrained, or a training checkpoint")
    export_parser.add_argument("target", type=Path, help=".pt file to write")
    return parser


def _model_type(folder: Path) -> str:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: name a folder written by save_pretrained")
    return json.loads(path.read_text()).get("model_type", "")


def _summary(model: LlamaGenForCausalLM | VQModel) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{type(model).__name__}, {millions:.1f}M parameters"


if __name__ == "__main__":
    main()
