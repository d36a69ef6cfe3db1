"""What a loss form costs beside the student: seconds and memory of its derivatives.

    taskset -c 0 python tests/benchmarks/loss_cost.py pairwise --examples 128 --classes 1000

The first derivative is what a taught student's step takes, the second what a step back takes. One
form and size a process, for the memory is what the process's peak grew by.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from cost import now, peak_mib

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugins"))

from l2t_core.losses.forms import FORMS, differences, neutral_coefficients
from l2t_core.losses.taught import taught_loss
from l2t_core.specs import LossSpec


def main() -> None:
    """Print seconds and MiB of the derivatives asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("form", choices=FORMS.names())
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--first", action="store_true", help="the first derivative only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    spec = LossSpec(args.form, "identity")
    apart = differences(spec, args.classes, 1, 0.01)
    phi = {
        name: (part + apart[name][0]).requires_grad_()
        for name, part in neutral_coefficients(spec, args.classes).items()
    }
    logits = torch.randn(args.examples, args.classes, requires_grad=True)
    targets = torch.randint(args.classes, (args.examples,))

    def derivatives() -> None:
        loss = taught_loss(spec, torch.log_softmax(logits, 1), targets, phi).mean()
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=not args.first)
        if not args.first:
            torch.autograd.grad(gradient.sum(), [logits, *phi.values()], allow_unused=True)

    before = peak_mib()
    derivatives()  # the first time pays for torch's own beginnings
    began = now()
    derivatives()
    print(
        f"{args.form}, {args.examples} x {args.classes}, "
        f"{'first' if args.first else 'second'} derivative: {1000 * (now() - began):.0f} ms, "
        f"{peak_mib() - before:.0f} MiB"
    )


if __name__ == "__main__":
    main()
