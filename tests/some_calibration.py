"""Step times that were never measured."""

import dataclasses

from specmemo_jax.llama.buffers import Cost
from specmemo_jax.planning.calibration import Calibration, DraftPoint, PrefillPoint, StepPoint, fingerprint
from specmemo_jax.testing import TINY

MINE = fingerprint("Some CPU", "org/tiny", TINY, "float32")


def some_calibration(**changes):
    found = Calibration(
        fingerprint=MINE,
        date="2026-01-31",
        num_layers=TINY.num_layers,
        bandwidth=1e9,
        flops=1e10,
        smallest_roof_seconds=1e-4,
        steps=(StepPoint(1, 1, 256, 1e-3), StepPoint(1, 8, 256, 2e-3), StepPoint(1, 1, 512, 1.5e-3)),
        prefills=(PrefillPoint(32, 256, 1e-3),),
        drafts=(DraftPoint("self:1", 4, 256, Cost(3, 10.0, 20.0), 5e-4),),
    )
    return dataclasses.replace(found, **changes)
