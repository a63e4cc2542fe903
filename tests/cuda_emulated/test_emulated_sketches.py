"""The tests of page sketches, answered by the CUDA kernels in emulation."""

# ruff: noqa: F401 - tests run where they are imported.
from test_sketch import (
    test_a_query_that_is_not_finite_has_scores_that_are_not_numbers,
    test_a_token_that_is_not_finite_has_the_highest_score_unless_it_is_masked,
    test_kernels_give_the_bits_of_the_reference,
    test_masked_tokens_do_not_count,
    test_scores_agree_with_the_reference,
    test_selection_is_that_of_float_scores,
    test_the_page_of_a_key_that_the_query_points_at_scores_highest,
)
from test_sketch_calls import (
    test_several_queries_select_as_if_each_came_alone,
    test_sparse_decode_is_score_select_attend,
)
