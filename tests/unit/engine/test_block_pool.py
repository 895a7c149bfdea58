"""BlockPool against a model of holders, and the order in which content is forgotten."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kvmesh.engine.cache.block_pool import BlockPool, OutOfBlocks


class PoolMachine(RuleBasedStateMachine):
    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(12)
        self.held = []

    @rule(target=tables, count=st.integers(0, 6))
    def allocate(self, count):
        free = self.pool.free
        try:
            table = self.pool.allocate(count)
        except OutOfBlocks:
            assert count > free
            assert self.pool.free == free
            return multiple()
        assert len(set(table)) == count
        self.held.append(table)
        return table

    @rule(target=tables, table=tables)
    def share(self, table):
        self.pool.share(table)
        copy = list(table)
        self.held.append(copy)
        return copy

    @rule(table=consumes(tables))
    def release(self, table):
        self.pool.release(table)
        self.held = [other for other in self.held if other is not table]

    @rule(table=tables, seed=st.integers(0, 5))
    def publish(self, table, seed):
        for position, block in enumerate(table):
            self.pool.publish(block, bytes([seed, position]))

    @rule(target=tables, seed=st.integers(0, 5), length=st.integers(0, 6))
    def match_and_share(self, seed, length):
        found = self.pool.match([bytes([seed, position]) for position in range(length)])
        assert len(found) <= length
        self.pool.share(found)
        self.held.append(found)
        return found

    @invariant()
    def consistent(self):
        assert self.pool.check_integrity(self.held) == []
        assert self.pool.free + self.pool.used == self.pool.total


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_deepest_block_of_the_oldest_table_is_forgotten_first():
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for name, table in (("old", old), ("new", new)):
        for position, block in enumerate(table):
            pool.publish(block, f"{name}{position}".encode())
    pool.release(old)
    pool.release(new)
    pool.release([pool.allocate(1)[0]])
    assert pool.match([b"old0", b"old1"]) == [old[0]]
    assert pool.match([b"new0", b"new1"]) == new


def test_blocks_without_content_are_taken_before_cached_ones():
    pool = BlockPool(3)
    cached, scratch = pool.allocate(1), pool.allocate(1)
    pool.publish(cached[0], b"kept")
    pool.release(cached)
    pool.release(scratch)
    pool.allocate(2)
    assert pool.match([b"kept"]) == cached


def test_releasing_what_nobody_holds_is_refused():
    pool = BlockPool(1)
    with pytest.raises(ValueError, match="not held"):
        pool.release([0])


def test_integrity_names_a_leak():
    pool = BlockPool(2)
    leaked = pool.allocate(1)
    assert pool.check_integrity([]) == [f"block {leaked[0]}: 1 references, 0 holders"]
