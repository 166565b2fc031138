"""Liger's kernels for norms, rotations and the MLP's gate, where liger-kernel is installed."""

from typing import Any

from collapse.utils.provenance import liger_version


def use_liger(causal_lm: Any) -> None:
    """Exchange kernels of RMSNorm, RoPE and SwiGLU, in place; call it before adapters are added.

    Does nothing on a CPU, without liger-kernel, or for an architecture that it does not know. Its
    losses are left out: a step here makes logits only where a token is predicted. The exchange of
    RoPE stays for all models of the architecture in this process. Gradients in bfloat16 differ by
    rounding: studies/gpu_check.py, step 4, takes up to 2% of their norm.
    """
    if liger_version(causal_lm.device) is None:
        return
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(
        model=causal_lm,
        rope=True,
        rms_norm=True,
        swiglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
    )
