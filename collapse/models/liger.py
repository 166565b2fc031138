"""Liger's kernels for norms, rotations and the MLP's gate, where liger-kernel is installed."""

from typing import Any

from collapse.utils.provenance import liger_version


def use_liger(causal_lm: Any) -> None:
    """Replace the kernels of RMSNorm, RoPE and SwiGLU, in place; call it before adding adapters.

    Does nothing on a CPU, without liger-kernel, or for an architecture that it does not know. Its
    losses are not used, because our steps make logits only where a token is predicted. RoPE stays
    replaced for all models of the architecture in this process. Gradients in bfloat16 differ by
    rounding; studies/gpu_check.py, step 4, accepts up to 2% of their norm.
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
