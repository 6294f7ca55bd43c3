"""Tiny judges with random weights, saved in the formats of the real ones, for tests without downloads."""

from benchmark.speed.random_judges import (
    MANIQA_SIZES,
    official_vit,
    pictures,
    pyiqa_maniqa,
    save_aesthetic_head,
    save_clip,
    save_image_reward,
    save_maniqa,
    save_ocr,
    save_open_clip,
    save_qwen,
    words,
)

__all__ = [
    "official_vit",
    "pictures",
    "pyiqa_maniqa",
    "save_aesthetic_head",
    "save_clip",
    "save_image_reward",
    "save_maniqa",
    "save_ocr",
    "save_open_clip",
    "save_qwen",
    "shrink_maniqa",
    "words",
]


def shrink_maniqa(monkeypatch) -> None:
    """MANIQA with all its parts, but 64 patches of width 48 instead of 784 of width 768."""
    from reward_utils.maniqa import ManiqaNetwork

    sizes, vit_sizes = MANIQA_SIZES["tiny"]
    monkeypatch.setattr(ManiqaNetwork, "sizes", sizes)
    monkeypatch.setattr(ManiqaNetwork, "vit_sizes", vit_sizes)
