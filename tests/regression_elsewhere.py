"""Cases about adapters, counts and shards: the test in this folder for each, or why none."""

from __future__ import annotations

ELSEWHERE = {
    "N-08": "test_adapter_reports.py::test_a_negative_target_is_never_dropped_N_08",
    "N-17": "integrations/test_reports.py::test_accumulation_in_trl_changes_no_norm_N_17",
    "N-18": "test_adapter_reports.py::"
    "test_the_terms_weigh_the_same_whatever_the_tensor_parallelism_N_18",
    "N-19": "integrations/test_reports.py::test_models_that_take_no_keywords_of_a_loss_N_19",
    "N-21": "test_adapter_reports.py::test_a_label_beyond_the_vocabulary_is_refused_N_21",
    "N-23": "integrations/test_reports.py::test_a_teacher_that_is_one_token_off_is_seen_N_23",
    "N-25": "test_adapter_reports.py::test_a_soft_term_without_a_teacher_is_refused_N_25",
    # until a router's aux_loss can be added, a model that would lose it is refused
    "N-35": "integrations/test_transformers.py::test_a_router_whose_loss_would_be_lost_is_refused",
}
#: Cases that no test covers yet, and why; N-21 on shards waits as N-38 does.
WAITING = {
    "N-36": "a recipe's pipeline and its further heads are no loss's: docs/howto/automodel.md",
    "N-38": "shards of a vocabulary",
    "N-39": "shards of a vocabulary",
}
