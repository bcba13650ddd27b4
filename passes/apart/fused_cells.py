"""What CUDA computes in one kernel for a recurrent cell, taken apart: torch's ops for nn.GRUCell and nn.LSTMCell.

Their backward ops add up the gradients of the biases over the batch inside, where no rule could clip them. So before
anything else looks at the joint graph, they and the forward ops become the formulas below, which give the same results,
what the forward keeps for the backward (the workspace) included: checked against ATen/native/cuda/RNN.cu, 2.11, 2.13.

`i`, `h` are the gates [B, 3H or 4H] as the two linear maps give them, `*_bias` their biases [3H or 4H] or None. As in
the kernels, half precision is computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashdp_compile.compat import OpOverload

aten = torch.ops.aten


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return _wide(gates) if bias is None else _wide(gates) + _wide(bias)


def gru_cell(
    i: Tensor, h: Tensor, hx: Tensor, i_bias: Tensor | None = None, h_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(hy [B, H], workspace [B, 5H] of reset, update, new, hx and the hidden part of new)."""
    i_reset, i_update, i_new = _biased(i, i_bias).chunk(3, 1)
    h_reset, h_update, h_new = _biased(h, h_bias).chunk(3, 1)
    reset, update = (i_reset + h_reset).sigmoid(), (i_update + h_update).sigmoid()
    new = (i_new + reset * h_new).tanh()
    hy = new + update * (_wide(hx) - new)
    return hy.to(hx.dtype), torch.cat([reset, update, new, _wide(hx), h_new], 1).to(hx.dtype)


def gru_cell_backward(
    grad_hy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of i, h, hx and of both biases."""
    reset, update, new, hx, h_new = _wide(workspace).chunk(5, 1)
    grad = _wide(grad_hy)
    by_update = grad * (hx - new) * (1 - update) * update
    by_new = grad * (1 - update) * (1 - new * new)
    by_reset = by_new * h_new * (1 - reset) * reset
    by_i = torch.cat([by_reset, by_update, by_new], 1).to(workspace.dtype)
    by_h = torch.cat([by_reset, by_update, by_new * reset], 1).to(workspace.dtype)
    by_biases = (by_i.sum(0), by_h.sum(0)) if has_bias else (None, None)
    return by_i, by_h, (grad * update).to(workspace.dtype), *by_biases


def lstm_cell(
    i: Tensor, h: Tensor, cx: Tensor, i_bias: Tensor | None = None, h_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(hy [B, H], cy [B, H], workspace [B, 4H] of the gates: input, forget, new and output, activated)."""
    gates = (_biased(i, i_bias) + _biased(h, h_bias)).chunk(4, 1)
    enter, forget, new, leave = gates[0].sigmoid(), gates[1].sigmoid(), gates[2].tanh(), gates[3].sigmoid()
    cy = forget * _wide(cx) + enter * new
    hy = leave * cy.tanh()
    return hy.to(cx.dtype), cy.to(cx.dtype), torch.cat([enter, forget, new, leave], 1).to(cx.dtype)


def lstm_cell_backward(
    grad_hy: Tensor | None, grad_cy: Tensor | None, cx: Tensor, cy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the gates, which are those of i and of h, of cx, and of the biases."""
    if grad_hy is None and grad_cy is None:
        return None, None, None
    enter, forget, new, leave = _wide(workspace).chunk(4, 1)
    squashed = _wide(cy).tanh()
    by_hy = torch.zeros_like(squashed) if grad_hy is None else _wide(grad_hy)
    by_cy = by_hy * leave * (1 - squashed * squashed)
    by_cy = by_cy if grad_cy is None else by_cy + _wide(grad_cy)
    by_gates = [
        by_cy * new * (1 - enter) * enter,
        by_cy * _wide(cx) * (1 - forget) * forget,
        by_cy * enter * (1 - new * new),
        by_hy * squashed * (1 - leave) * leave,
    ]
    gates = torch.cat(by_gates, 1).to(workspace.dtype)
    return gates, (by_cy * forget).to(cx.dtype), gates.sum(0) if has_bias else None


# torch itself takes _thnn_fused_lstm_cell_backward apart into _impl, and whoever records it anyway is refused.
FORMULAS: dict[OpOverload, Callable[..., tuple[Tensor | None, ...]]] = {
    aten._thnn_fused_gru_cell.default: gru_cell,
    aten._thnn_fused_gru_cell_backward.default: gru_cell_backward,
    aten._thnn_fused_lstm_cell.default: lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: lstm_cell_backward,
}
