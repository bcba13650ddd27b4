"""Three corrections of the interpreter of Triton 3.6, without which it cannot run the kernels as a GPU would.

* NumPy 2.4 refuses int() of an array of shape [1], which is how the interpreter holds a scalar: loop bounds fail.
* tl.dot multiplies the bit patterns of bfloat16 operands as if they were integers.
* float32 to bfloat16 truncates, where the hardware rounds to nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def bfloat16_to_float32(data):
    return (data.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(data):
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)


def apply() -> None:
    builder = interpreter.InterpreterBuilder
    patch_tensor, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patched_cast(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(float32_to_bfloat16(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(bfloat16_to_float32(src.data), tl.float32)
        return cast(self, src, dst_type)

    def patched_dot(self, a, b, d, *options):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(bfloat16_to_float32(t.data), tl.float32) for t in (a, b))
        return dot(self, a, b, d, *options)

    interpreter._patch_lang_tensor = patched_tensor
    builder.cast_impl = patched_cast
    builder.create_dot = patched_dot
