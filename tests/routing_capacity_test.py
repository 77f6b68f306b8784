"""Groups and capacities, against the paper's layout."""

import pytest

from st_moe.config import RouterConfig
from st_moe.errors import UserError
from st_moe.routing import expert_capacity, num_groups


@pytest.mark.parametrize(
  ('factor', 'encoder', 'decoder'),
  [
    (0.5, 32, 7),
    (0.75, 48, 10),
    (1.0, 64, 14),
    (1.25, 80, 17),
    (2.0, 128, 28),
    (3.0, 192, 42),
  ],
)
def test_paper_capacities_of_32_experts(factor, encoder, decoder):
  config = RouterConfig(train_capacity_factor=factor)
  assert expert_capacity(config, 2048, 32, train=True) == encoder
  assert expert_capacity(config, 456, 32, train=True) == decoder


def test_evaluation_has_its_own_factor():
  config = RouterConfig(train_capacity_factor=1.25, eval_capacity_factor=2.0)
  assert expert_capacity(config, 2048, 32, train=False) == 128


def test_top_n_gets_no_more_slots_unless_assignments_are_counted():
  for choices in (1, 2, 3):
    tokens = RouterConfig(num_choices=choices)
    assert expert_capacity(tokens, 64, 8, train=True) == 10
  assignments = RouterConfig(num_choices=3, capacity_formula='assignments')
  assert expert_capacity(assignments, 64, 8, train=True) == 30


@pytest.mark.parametrize(
  ('rounding', 'slots'), [('floor', 17), ('round', 18), ('ceil', 18)]
)
def test_rounding(rounding, slots):  # 456 * 1.25 / 32 = 17.81
  config = RouterConfig(capacity_rounding=rounding)
  assert expert_capacity(config, 456, 32, train=True) == slots


def test_rounds_half_to_even_as_t5x_does():
  config = RouterConfig(capacity_rounding='round', train_capacity_factor=1.0)
  assert expert_capacity(config, 20, 8, train=True) == 4  # 2.5 -> 2, minimum 4
  assert expert_capacity(config, 52, 8, train=True) == 6  # 6.5
  assert expert_capacity(config, 60, 8, train=True) == 8  # 7.5


def test_never_more_than_the_group_but_at_least_the_minimum():
  config = RouterConfig(train_capacity_factor=100.0)
  assert expert_capacity(config, 16, 8, train=True) == 16
  assert expert_capacity(RouterConfig(), 8, 64, train=True) == 4
  assert expert_capacity(RouterConfig(), 2, 64, train=True) == 4


def test_fixed_capacity_is_taken_as_it_is():
  config = RouterConfig(capacity_formula='fixed', fixed_capacity=3)
  assert expert_capacity(config, 512, 8, train=True) == 3
  assert expert_capacity(config, 512, 8, train=False) == 3
  assert expert_capacity(config, 2, 8, train=True) == 2


def test_no_slot_at_all_is_an_error():
  config = RouterConfig(min_expert_capacity=0)
  with pytest.raises(UserError, match='4 tokens .* 32 experts .* to none'):
    expert_capacity(config, 4, 32, train=True)


@pytest.mark.parametrize(
  ('tokens', 'group_size', 'shards', 'groups'),
  [
    (8192, 2048, 1, 4),
    (100, 2048, 1, 1),  # fewer tokens than a group
    (100, 30, 1, 4),  # 3 does not divide 100
    (48, 8, 4, 8),  # 6 is no multiple of 4 shards
    (64 * 114, 456, 16, 16),  # the paper's decoder
    (7, 3, 1, 7),  # a prime number of tokens
    (12, 100, 4, 4),  # never fewer groups than shards
  ],
)
def test_groups_grow_until_they_fit(tokens, group_size, shards, groups):
  assert num_groups(tokens, group_size, shards) == groups


def test_groups_equal_the_search_of_the_released_code():
  for tokens in range(1, 200, 7):
    for group_size in (1, 5, 16, 1000):
      for shards in (n for n in (1, 2, 3, 4) if tokens % n == 0):
        groups = max(1, tokens // group_size)
        while groups % shards or tokens % groups:
          groups += 1
        assert num_groups(tokens, group_size, shards) == groups


def test_tokens_that_do_not_divide_over_devices_are_an_error():
  with pytest.raises(UserError, match='30 tokens .* 4 devices'):
    num_groups(30, 8, 4)
