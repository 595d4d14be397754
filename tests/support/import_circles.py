"""An import-linter contract: no module imports itself by way of others."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
from importlinter import Contract, ContractCheck, fields, output


class NoCircles(Contract):
    """Broken if some module of `packages` can be reached from itself. What only type checkers import runs nothing."""

    packages = fields.SetField(subfield=fields.StringField())

    def check(self, graph: grimp.ImportGraph, verbose: bool) -> ContractCheck:
        run = grimp.build_graph(*sorted(self.packages), exclude_type_checking_imports=True)
        imports = {module: run.find_modules_directly_imported_by(module) for module in run.modules}
        try:
            TopologicalSorter(imports).prepare()
        except CycleError as error:
            return ContractCheck(kept=False, metadata={"circle": error.args[1]})
        return ContractCheck(kept=True)

    def render_broken_contract(self, check: ContractCheck) -> None:
        output.print(" is imported by ".join(check.metadata["circle"]))
