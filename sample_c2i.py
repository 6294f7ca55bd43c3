"""Pictures of some classes on one sheet, for a person: python sample_c2i.py --classes 14 108 296 884 --guidance_scale 2.0

One row per class, its number and name above it. (For numbers there is test.sh, which draws all classes for FID.)
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmark.sample_classes import (
    PRECISIONS,
    add_draw_arguments,
    add_model_arguments,
    load_models,
    pick_classes,
    pick_device,
)
