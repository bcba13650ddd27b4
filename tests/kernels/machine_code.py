"""What the machine code of a kernel for sm_90 says of its tensor cores."""

import re
import subprocess
import tempfile


def disassembled(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def early_reads(code: str) -> list[str]:
    """Instructions that read or write a sum to which a product is still being added.

    A product of 64 rows (HGMMA) adds to half as many registers as it has columns, long after the instruction: until a
    wait that leaves nothing under way, only other products may touch them. Code is read in the order of its addresses.
    """
    summed: set[int] = set()
    found = []
    for line in code.splitlines():
        instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        text = instruction[1] if instruction else ""
        if product := re.search(r"HGMMA\.64x(\d+)x\d+\S* R(\d+),", text):
            summed.update(range(int(product[2]), int(product[2]) + int(product[1]) // 2))
        elif "WARPGROUP.DEPBAR" in text and text.split()[-1] == "0x0":
            summed.clear()
        elif summed.intersection(map(int, re.findall(r"\bR(\d+)\b", text))):
            found.append(text.strip())
    return found
