"""The tables of rules are the same whatever a process imported before: an op that is registered late has its rule."""

import json

from backend.processes import Forks

FIRST = (
    "from flashdp_compile.passes.axes import engine",
    "import flashdp_compile; flashdp_compile.backend",
    "import torch._inductor.compile_fx, torch._inductor.lowering, torch.export",
)
PROGRAM = """
import json
{first}
import flashdp_compile.pipeline
from flashdp_compile.passes.axes import registry

rules = {{str(op): f"{{rule.__module__}}.{{rule.__qualname__}}" for op, rule in registry.RULES.items()}}
tables = registry.LINEAR, registry.UNIFORM, registry.NO_DATA, registry.ABSENT
print(json.dumps([rules, *(sorted(map(str, t)) for t in tables)]))
"""


def test_tables_do_not_depend_on_what_was_imported_first():
    forks = Forks("import torch")  # as every one of them begins
    rules, *tables = [json.loads(forks.output_of(PROGRAM.format(first=first)).splitlines()[-1]) for first in FIRST]
    forks.close()
    assert len(rules[0]) > 250 and rules[4] == []
    assert all(table == rules for table in tables)
