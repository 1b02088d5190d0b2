"""float64 where there is none."""

from __future__ import annotations

import torch
from far_device import FAR, far_device

from trainer.ops.exact import in_float64


def test_where_the_device_has_no_float64_the_cpu_has() -> None:
    value = torch.tensor([1.0, 2.0])
    assert in_float64(value).dtype == torch.float64
    with far_device():
        found = in_float64(value.to(FAR))
        assert found.device.type == "cpu" and found.dtype == torch.float64
        assert torch.equal(found, value.double())
