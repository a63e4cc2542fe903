"""The operator tests, answered by the CUDA kernels in emulation."""

# ruff: noqa: F401, I001 - tests run where they are imported.
from test_attend_pages import (
    test_is_attention_over_the_listed_pages,
    test_large_logits_do_not_overflow,
    test_masked_tokens_are_never_attended,
    test_no_other_page_is_read,
    test_nothing_attended_is_zero_and_minus_infinity,
    test_scale_multiplies_the_logits,
    test_skips_slots_that_are_no_page_in_use,
)
from test_dense_decode import (
    test_any_length,
    test_is_attention_over_all_live_positions,
    test_one_token_is_its_value,
    test_query_may_have_any_strides,
)
from test_group_softmax import (
    test_a_page_that_is_nan_for_one_head_is_nan_and_takes_nothing_from_the_others,
    test_a_page_that_one_head_wants_is_found,
    test_far_below_the_best_is_zero_and_ties_share,
    test_infinite_bounds_share_equally,
    test_pages_that_count_for_no_head_are_minus_infinity_and_those_of_some_are_not,
    test_shares_sum_to_the_number_of_heads_that_count,
    test_top_p_keeps_the_smallest_set_with_that_part_of_the_shares,
)
from test_score_pages import (
    test_a_page_with_a_key_that_is_nan_scores_nan,
    test_a_query_that_is_nan_scores_nan,
    test_any_finite_keys,
    test_is_the_definition,
    test_one_seq_len_serves_all_rows,
    test_scale_multiplies_the_products,
    test_scores_complete_pages_only,
    test_strides_of_the_mask_do_not_matter,
)
from test_select_pages import (
    test_budget_beyond_the_cache,
    test_group_shares_pages_that_are_live_for_one_of_its_heads,
    test_lists_every_page_when_all_fit,
    test_mask_strides_do_not_matter,
    test_orders_special_scores,
    test_page_without_a_live_token_is_never_selected,
    test_selects_as_the_contract_says,
    test_sinks_and_recents_are_there,
    test_sinks_are_the_first_live_pages,
    test_ties_go_to_the_lowest_index,
)
from test_several_queries import (
    test_what_a_query_may_not_attend_is_not_read,
)
from test_sparse_decode import (
    test_budget_that_holds_the_sequence_equals_dense_bit_for_bit,
    test_equals_score_select_attend_or_dense_bit_for_bit,
    test_is_attention_over_the_best_pages,
    test_no_page_beyond_the_budget_is_read,
    test_nothing_to_attend_is_zero,
    test_open_page_is_always_attended,
    test_row_that_fits_is_dense_beside_rows_that_do_not,
    test_the_key_that_matters_is_found,
)
from test_sparse_decode_step import (
    test_is_update_and_sparse_decode_bit_for_bit,
    test_steps_one_after_the_other,
)
from test_update_page_summary import (
    test_a_write_that_does_not_follow_rebuilds_where_the_next_position_is_known,
    test_crop_and_continue,
    test_foreign_rewrite_of_one_page_is_found_while_decoding_goes_on,
    test_foreign_rewrite_of_the_last_sealed_page_is_found,
    test_knowing_nothing_rebuilds_everything,
    test_positions_in_any_order,
    test_prefill_in_pieces,
    test_prefill_of_any_length,
    test_refill_of_the_same_length,
    test_rows_have_the_bits_of_their_definition,
)
