"""Embedding: a token's vector is its row of the table, to the last bit."""

import numpy as np
import pytest

from . import torch_ops
from .bounds import assert_same
from .laws import assert_refused, assert_that, law, small_sizes, sources


@law("embedding", sources, small_sizes, small_sizes, small_sizes)
def test_each_token_gets_its_row(ops, source, V, D, T):
    """embedding(tokens, w)[b, t] is w[tokens[b, t]], to the last bit."""
    weight, tokens = source.array(V, D), source.ids(V, 2, T)
    expected = [[weight[i] for i in row] for row in tokens]
    assert_same(ops.embedding(tokens, weight), expected)


@law("embedding", sources, small_sizes, small_sizes, small_sizes)
def test_as_pytorch(ops, source, V, D, T):
    """It gives what torch.nn.functional.embedding gives."""
    weight, tokens = source.array(V, D), source.ids(V, 2, T)
    assert_same(ops.embedding(tokens, weight), torch_ops.embedding(tokens, weight))


@law("embedding", sources, small_sizes, small_sizes)
def test_the_order_of_tokens_is_kept(ops, source, V, T):
    """Turning the tokens round turns the vectors round."""
    weight, tokens = source.array(V, 3), source.ids(V, 2, T)
    assert_same(ops.embedding(tokens[:, ::-1], weight), ops.embedding(tokens, weight)[:, ::-1])


@law("embedding", sources, small_sizes, small_sizes)
def test_rows_that_nobody_names_do_not_matter(ops, source, V, T):
    """Only the rows named by a token are read: NaN in all others changes nothing."""
    weight, tokens = source.array(V + 2, 3), source.ids(V, 1, T)
    poisoned = np.where(np.isin(np.arange(V + 2), tokens)[:, None], weight, np.nan)
    assert_same(ops.embedding(tokens, poisoned), ops.embedding(tokens, weight))


@pytest.mark.parametrize("bad", [-1, -5, 5, 6, 2**31, -(2**40)])
@law("embedding")
def test_ids_outside_the_table_are_refused(ops, bad):
    """An id below 0 or beyond the last row is an error, and never counts from the end."""
    assert_refused(
        lambda: ops.embedding(np.array([[0, bad, 4]]), np.ones((5, 3))), f"id {bad} of a table of 5 rows"
    )


@law("embedding")
def test_the_first_and_the_last_row_are_in_the_table(ops):
    """Ids 0 and V - 1 are fine, and so is no token at all."""
    weight = np.arange(15.0).reshape(5, 3)
    assert_same(ops.embedding(np.array([[0, 4]]), weight), weight[None, [0, 4]])
    assert_same(ops.embedding(np.zeros((1, 0), int), weight), np.zeros((1, 0, 3)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@law("embedding", sources)
def test_the_precision_is_that_of_the_table(ops, dtype, source):
    """What comes out has the dtype of the table."""
    weight = source.array(4, 3).astype(dtype)
    found = ops.embedding(source.ids(4, 1, 2), weight).dtype
    assert_that(found == dtype, f"the table is {np.dtype(dtype)}, what came out is {found}")
