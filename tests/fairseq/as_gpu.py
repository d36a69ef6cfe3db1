"""``python -m as_gpu FLAGS``: fairseq-train on a CPU by the code that it runs on a GPU.

What fairseq asks of a GPU in half precision and under ``--ddp-backend pytorch_ddp`` is answered for
the CPU: where tensors go, which device is current, which devices torch's wrapper is to use.
"""

from __future__ import annotations

import runpy
from typing import Any

import torch
from fairseq.models import distributed_fairseq_model

_Wrapper = distributed_fairseq_model.DistributedDataParallel


def _on_the_cpu(*, device_ids: Any, output_device: Any, **settings: Any) -> Any:
    return _Wrapper(**settings)


if __name__ == "__main__":
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: 0
    distributed_fairseq_model.DistributedDataParallel = _on_the_cpu
    runpy.run_module("fairseq_cli.train", run_name="__main__", alter_sys=True)
