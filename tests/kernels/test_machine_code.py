"""The reader of machine code finds what it looks for; test_offline_compile.py asks it about every kernel."""

from machine_code import early_reads

PRODUCT = "        /*2cd0*/                   HGMMA.64x256x16.F32 R24, gdesc[UR8].tnspA.tnspB, R24, gsb0 ;"
ONE_LEFT = "        /*2ce0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"
NONE_LEFT = "        /*4190*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
ROUNDED = "        /*2cf0*/                   F2FP.F16.F32.PACK_AB R8, R{}, R{} ;"


def test_a_sum_is_read_behind_the_last_wait():
    assert early_reads("\n".join([PRODUCT, ONE_LEFT, PRODUCT, NONE_LEFT, ROUNDED.format(25, 24)])) == []


def test_a_sum_that_is_read_too_early_is_found():
    """As ptxas 12.8 did, for float16, with a branch between the two waits."""
    code = [PRODUCT, ONE_LEFT, *(ROUNDED.format(n + 1, n) for n in (22, 24, 150, 152)), NONE_LEFT]
    assert early_reads("\n".join(code)) == ["F2FP.F16.F32.PACK_AB R8, R25, R24", "F2FP.F16.F32.PACK_AB R8, R151, R150"]
