"""Judges by name. A new one is a file with a `Scorer` in it and a line here."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

from reward_utils.arguments import ScorerArguments
from reward_utils.remote import RemoteScorer, RemoteServer, parse_remote
from reward_utils.scorer import Scorer, Shared

SCORERS = {
    "clip": "reward_utils.clip:ClipScorer",
    "hpsv2": "reward_utils.hpsv2:HPSv2Scorer",
    "maniqa": "reward_utils.maniqa:ManiqaScorer",
    "qwen_label": "reward_utils.qwen:QwenLabelScorer",
    "qwen_fake": "reward_utils.qwen:QwenFakeScorer",
    "qwen_weird": "reward_utils.qwen:QwenWeirdScorer",
    "pickscore": "reward_utils.pickscore:PickScorer",
    "image_reward": "reward_utils.image_reward:ImageRewardScorer",
    "aesthetic": "reward_utils.aesthetic:AestheticScorer",
    "deqa": "reward_utils.deqa:DeqaScorer",
    "unified_reward": "reward_utils.unified_reward:UnifiedRewardScorer",
    "geneval": "reward_utils.geneval:GenevalScorer",
    "ocr": "reward_utils.ocr:OcrScorer",
    "toy_geneval": "toy.geneval:ToyGenEvalScorer",
}


def build_scorers(names: Iterable[str], arguments: ScorerArguments | None = None) -> dict[str, Scorer]:
    """The judges of these names, none loaded yet; those on the same weights share one network.

    A name in `remote_rewards` is built as a client of the server given there, whether it is known here or not.

    Raises:
        ValueError: for an unknown name; the message lists the known ones, nearest first.
    """
    arguments = arguments or ScorerArguments()
    remote = parse_remote(arguments.remote_rewards)
    shared = Shared()
    scorers = {}
    for name in dict.fromkeys(names):
        if name in remote:
            server = shared.get(RemoteServer, url=remote[name], **arguments.server_settings())
            kind = scorer_class(name) if name in SCORERS else None
            known = {"expected_range": kind.expected_range, "reads_text": kind.reads_text} if kind else {}
            scorers[name] = RemoteScorer(name, server, **known, own_class=kind)
        else:
            scorers[name] = scorer_class(name).from_arguments(arguments, shared)
    return scorers


def scorer_class(name: str) -> type[Scorer]:
    """The class behind a name; its file is imported only now."""
    if name not in SCORERS:
        raise unknown_name(name, SCORERS)
    module, _, class_name = SCORERS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)


def unknown_name(name: str, known: Iterable[str], what: str = "reward") -> ValueError:
    """The error for a misspelt name: all known ones, the nearest first."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    rest = [other for other in known if other not in nearest]
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return ValueError(f"no {what} is called {name!r}: {hint}Known: {', '.join(nearest + rest)}")
