"""The template macro that draws noise: the same numbers in whichever kernel they are added. See gaussian.py."""

import math

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57  # multipliers
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85  # increments of the key words
WORD = 0xFFFFFFFF

# draw_normals(index, shape): `normals` of [*shape], four for each Philox block in `index`, an int64 tensor of the same
# shape but for a quarter of the last dimension. Uses the parameters key_ptr and noise_stream. A deviation that is a
# parameter is made a float32 by tl.full: Inductor passes numbers in float64.
MACROS = f"""\
{{%- macro draw_normals(index, shape) -%}}
i = {{{{ index }}}}
zero = i * 0
k, step = zero + tl.load(key_ptr), zero + tl.load(key_ptr + 1)
k0, k1 = (k & {WORD}).to(tl.uint32), ((k >> 32) & {WORD}).to(tl.uint32)
c0, c1 = i.to(tl.uint32), (zero + noise_stream).to(tl.uint32)
c2, c3 = (step & {WORD}).to(tl.uint32), ((step >> 32) & {WORD}).to(tl.uint32)
for _ in tl.static_range(10):
    high_a, high_b = tl.umulhi(c0, {ROUND_A}), tl.umulhi(c2, {ROUND_B})
    c1, c3, low_a = high_b ^ c1 ^ k0, high_a ^ c3 ^ k1, c0 * {ROUND_A}
    c0, c1, c2, c3 = c1, c2 * {ROUND_B}, c3, low_a
    k0, k1 = k0 + {KEY_A}, k1 + {KEY_B}
radius_a = tl.sqrt(-2.0 * tl.log(c0.to(tl.float32) * {2.0**-32!r} + {2.0**-33!r}))
radius_b = tl.sqrt(-2.0 * tl.log(c2.to(tl.float32) * {2.0**-32!r} + {2.0**-33!r}))
angle_a = c1.to(tl.float32) * {2.0**-32!r} * {2 * math.pi!r}
angle_b = c3.to(tl.float32) * {2.0**-32!r} * {2 * math.pi!r}
# in the order of the elements: the last dimension that is joined varies fastest
cosines = tl.join(radius_a * tl.cos(angle_a), radius_b * tl.cos(angle_b))
sines = tl.join(radius_a * tl.sin(angle_a), radius_b * tl.sin(angle_b))
normals = tl.join(cosines, sines).reshape({{{{ shape }}}})
{{%- endmacro -%}}
"""
