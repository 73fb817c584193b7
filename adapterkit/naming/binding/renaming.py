"""Rename the targets of an adapter by the user's rules, for operations that bind no base.

Operations that bind an adapter to a base pass the rules to the resolver, which reports them together with its own
rules. All other operations rename the adapter itself, by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...core.adapter import Adapter, Target
from ...core.updates import Update
from ...errors import UsageError
from ..renames import Rename, parse_renames, renamed_by


def renamed(adapters: Sequence[Adapter], rename: str | Sequence[str | Rename]) -> list[Adapter]:
    """Rename the targets of adapters.

    Args:
        adapters: the adapters; each rule must match a target of at least one of them.
        rename: one rule or several, each `FROM=TO` or `@FILE`; the first rule that matches a target's name is used.

    Returns:
        the adapters in the same order; each lineage records the rules that changed the adapter.

    Raises:
        UsageError: a rule cannot be parsed, or concerns a base; or two targets of an adapter get the same name.
        TargetNotFound: a rule matches no target.
        StorageError, Malformed: a rules file cannot be read.
    """
    rules = parse_renames(rename, [target.path for adapter in adapters for target in adapter.updates])
    family = next((rule.text for rule in rules if rule.family or rule.rows), None)
    if family is not None:
        cure = f"Omit --rename {family} (rename=) here; use it where the adapter is bound to a base, as in merge"
        raise UsageError(f"the rule {family!r} concerns a base, but no base is read here", where="rename", cure=cure)
    return [_renamed(adapter, rules) for adapter in adapters] if rules else list(adapters)


def _renamed(adapter: Adapter, rules: Sequence[Rename]) -> Adapter:
    updates: dict[Target, tuple[Update, ...]] = {}
    used: dict[str, None] = {}
    for target, given in adapter.updates.items():
        path, rule = renamed_by(target.path, rules)
        new = replace(target, path=path)
        if new in updates:
            cure = "Correct --rename (rename=) so that all targets keep different names"
            raise UsageError(f"two targets would get the name {path}", where=str(target), cure=cure)
        updates[new] = given
        if rule is not None:
            used[rule.text] = None
    return adapter.replace(updates=updates).step("rename", rules=list(used)) if used else adapter
