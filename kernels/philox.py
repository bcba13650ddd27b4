"""The template macro that draws noise: the same numbers in whichever kernel they are added. See gaussian.py.

A kernel that adds noise to a sum over few samples spends more time on noise than on memory, so instructions count:

* high and low word of a product come from one multiplication in 64 bits;
* an angle is a word w in units of 2 pi / 2^32. Its two highest bits, of w + 2^29, are the quadrant; what remains lies
  within pi / 4 of it, where short polynomials (minimax, off by 4e-9) give sine and cosine. The functions of the library
  reduce any float32, with a table for large ones, at twice the instructions.
"""

import math

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57  # multipliers
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85  # increments of the key words
WORD = 0xFFFFFFFF
SINE = -0.16666655242443085, 0.008332177996635437, -0.0001951729936990887  # of x^3, x^5, x^7, behind x
COSINE = 0.04166664555668831, -0.001388736767694354, 2.4438451873720624e-05  # of x^4, x^6, x^8, behind 1 - x^2 / 2

# draw_normals(index, shape): `normals` of [*shape], four for each Philox block in `index`, an int64 tensor of the same
# shape but for a quarter of the last dimension. Uses the parameters key_ptr and noise_stream. A deviation that is a
# parameter is made a float32 by tl.full: Inductor passes numbers in float64.
# turned(radius, word, cosine, sine): radius times cosine and sine of a word's angle, under these names.
MACROS = f"""\
{{%- macro turned(radius, word, cosine, sine) -%}}
turn = {{{{ word }}}} + {1 << 29}
angle = ((turn & {(1 << 30) - 1}).to(tl.int32) - {1 << 29}).to(tl.float32) * {2 * math.pi * 2.0**-32!r}
angle_2 = angle * angle
even = {COSINE[0]!r} + angle_2 * ({COSINE[1]!r} + angle_2 * {COSINE[2]!r})
uneven = {SINE[0]!r} + angle_2 * ({SINE[1]!r} + angle_2 * {SINE[2]!r})
along = {{{{ radius }}}} * (1.0 + angle_2 * (-0.5 + angle_2 * even))
across = {{{{ radius }}}} * (angle + angle * angle_2 * uneven)
aside, behind = (turn & {1 << 30}) != 0, (turn & {1 << 31}) != 0
{{{{ cosine }}}}, {{{{ sine }}}} = tl.where(aside, across, along), tl.where(aside, along, across)
{{{{ cosine }}}} = tl.where(aside != behind, -{{{{ cosine }}}}, {{{{ cosine }}}})
{{{{ sine }}}} = tl.where(behind, -{{{{ sine }}}}, {{{{ sine }}}})
{{%- endmacro -%}}
{{%- macro draw_normals(index, shape) -%}}
i = {{{{ index }}}}
zero = i * 0
k, step = zero + tl.load(key_ptr), zero + tl.load(key_ptr + 1)
k0, k1 = (k & {WORD}).to(tl.uint32), ((k >> 32) & {WORD}).to(tl.uint32)
c0, c1 = i.to(tl.uint32), (zero + noise_stream).to(tl.uint32)
c2, c3 = (step & {WORD}).to(tl.uint32), ((step >> 32) & {WORD}).to(tl.uint32)
for _ in tl.static_range(10):
    wide_a, wide_b = c0.to(tl.uint64) * {ROUND_A}, c2.to(tl.uint64) * {ROUND_B}
    c0, c2 = (wide_b >> 32).to(tl.uint32) ^ c1 ^ k0, (wide_a >> 32).to(tl.uint32) ^ c3 ^ k1
    c1, c3 = wide_b.to(tl.uint32), wide_a.to(tl.uint32)
    k0, k1 = k0 + {KEY_A}, k1 + {KEY_B}
radius_a = tl.sqrt(-2.0 * tl.log(c0.to(tl.float32) * {2.0**-32!r} + {2.0**-33!r}))
radius_b = tl.sqrt(-2.0 * tl.log(c2.to(tl.float32) * {2.0**-32!r} + {2.0**-33!r}))
{{{{ turned("radius_a", "c1", "cosine_a", "sine_a") }}}}
{{{{ turned("radius_b", "c3", "cosine_b", "sine_b") }}}}
# in the order of the elements: the last dimension that is joined varies fastest
normals = tl.join(tl.join(cosine_a, cosine_b), tl.join(sine_a, sine_b)).reshape({{{{ shape }}}})
{{%- endmacro -%}}
"""
