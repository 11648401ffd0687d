"""The rows of each step: an endless sequence of permutations that any step can be computed from alone."""

from hypothesis import given
from hypothesis import strategies as st

from numpy_llama.training.order import Order

SEEDS = st.integers(0, 2**63 - 1)


@given(st.integers(1, 40), st.integers(1, 50), SEEDS)
def test_each_epoch_takes_each_row_once(n, batch, seed):
    order = Order(n, batch, seed)
    taken = [row for step in range(3 * n) for row in order(step)]
    for epoch in range(3):
        assert sorted(taken[epoch * n : (epoch + 1) * n]) == [*range(n)]


@given(st.integers(1, 40), st.integers(1, 50), SEEDS, st.integers(0, 10**6))
def test_a_step_does_not_depend_on_the_steps_before_it(n, batch, seed, step):
    walked = Order(n, batch, seed)
    for earlier in range(max(0, step - 5), step):
        walked(earlier)
    assert walked(step) == Order(n, batch, seed)(step)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {tuple(Order(20, 20, seed)(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
