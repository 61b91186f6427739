"""The changes that tests/mutants.py makes, by file, each with the tests that should notice it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A change to one file, and the tests that should notice."""

    file: str
    text: str
    replacement: str
    tests: str  # as pytest takes them
    why: str = ""  # no test can notice it

    @property
    def name(self) -> str:
        return f"{self.file}: {self.text!r} -> {self.replacement!r}"


def of(file: str, tests: str) -> Callable[..., Mutant]:
    """Mutants of one file with the tests that most of them need."""

    def mutant(text: str, replacement: str, tests: str = tests, why: str = "") -> Mutant:
        return Mutant(file, text, replacement, tests, why)

    return mutant


HOSTILE, SANDBOX, CODE = (
    f"tests/rewards/test_{name}.py" for name in ("hostile_programs", "sandbox", "code")
)
HAND_MADE = "tests/eval/test_hand_made_runs.py"
HARNESS = "tests/eval/test_harness.py"
EVALUATE = "tests/eval/test_evaluate.py"
SEARCHED = f"{EVALUATE}::test_benchmarks_stand_before_and_after_a_search"
RANKS = "tests/test_distributed.py::test_benchmarks_score_the_student_of_any_strategy"
UNJUDGED = "tests/test_distributed.py::test_what_the_first_rank_cannot_judge_stops_all"
TABLE = "tests/eval/test_benchmarks.py"
VERIFIER = "tests/rewards/test_verifier.py"
ANSWERS = "tests/test_answer_table.py"
EQUALITY = "tests/test_equality.py"
COMMA = "test_a_comma_separates_groups_of_three_or_numbers"
EXTRAPOLATION = "tests/test_extrapolation.py"
FILES = "tests/callbacks/test_files_of_a_run.py"
HELD = "tests/callbacks/test_held_out.py"
TEXTS = " ".join(
    f"{HELD}::test_texts_of_tokens_{name}"
    for name in ("are_together_the_completion", "keep_the_spaces_between_words")
)
CUT_SHORT = "test_a_teacher_that_is_cut_short_is_not_judged"
DEALT_HELD_OUT = f"{HELD}::test_two_processes_write_the_prompts_that_one_writes[ddp]"
ROLLOUTS_PAGE = "tests/eval/test_rollouts_page.py"
NUMBERS = "tests/test_numbers.py"
TOKENS = f"{NUMBERS}::test_metrics_of_tokens_and_rollouts"
WEIGHTS = f"{NUMBERS}::test_weights_move_by_the_rate_times_the_clipped_gradient"
SEARCHES = f"{NUMBERS}::test_searches_by_hand"
ACCURACY = f"{NUMBERS}::test_accuracy_is_the_share_of_right_answers_among_those_asked_for"
COMPLETIONS = f"{NUMBERS}::test_each_prompt_has_its_completions_and_they_differ"
COUNTS = f"{NUMBERS}::test_tokens_are_counted"
SUMMARY = f"{NUMBERS}::test_summary_says_what_metrics_csv_says"
VALIDATION = f"{NUMBERS}::test_validation_is_a_mean_over_all_tokens_and_answers"
PREDICTIONS = f"{NUMBERS}::test_predictions_hold_the_logprobs_of_student_and_teacher"
PART = f"{NUMBERS}::test_part_judges_on_that_share_of_the_completions"
HELD_OUT = f"{NUMBERS}::test_held_out_completions_are_scored_but_not_trained_on"
FRESH = f"{NUMBERS}::test_fresh_completions_are_generated_and_scored"
DROPOUT = f"{NUMBERS}::test_dropout_depends_on_the_seed_and_on_nothing_else"
SAMPLES = f"{NUMBERS}::test_samples_are_what_the_student_was_asked_and_said"
ENGINE = f"{NUMBERS}::test_engine_logprob_is_that_of_the_truncated_distribution"
BENCHMARKS = f"{HARNESS}::test_benchmarks_of_a_run_are_those_of_its_checkpoints"

PROMPTS = "tests/test_prompts.py"
STEP = "tests/test_step.py"
REUSE = "tests/test_reuse.py"
REUSE_WEIGHTS = f"{REUSE}::test_importance_weights_by_hand"
REUSE_STEPS = f"{REUSE}::test_steps_are_those_of_a_plain_loop_on_the_same_tokens"
REUSE_UNDONE = f"{REUSE}::test_an_undone_step_leaves_all_bit_for_bit_as_without_it"
REUSE_KEPT = f"{REUSE}::test_all_that_an_optimizer_keeps_is_put_back"
REUSE_NAN = f"{REUSE}::test_a_further_loss_that_is_not_a_number_takes_no_step"
REUSE_SHARED = f"{REUSE}::test_a_held_out_part_is_shared_and_read_once"
REUSE_ALL = f"{REUSE}::test_steps_without_a_guard_are_trained_on_everything"
REUSE_REFUSED = f"{REUSE}::test_what_cannot_be_is_refused"
REUSE_RUN = f"{REUSE}::test_a_batch_is_one_step_of_a_run_however_often_it_is_used"
REUSE_DROPOUT = f"{REUSE}::test_each_pass_has_dropout_of_its_own_and_no_judgement_has_any"
REUSE_OUT = f"{REUSE}::test_what_a_further_step_lacks_does_not_harm_the_one_that_is_counted"
DEALT = "test_two_processes_draw_the_same_rollouts_and_end_at_the_same_weights"
TWO = f"tests/test_distributed.py::{DEALT}[ddp]"
TILES = "tests/test_tokens.py"
SCORES = "tests/test_scores.py"
GAINS = " ".join(
    f"tests/callbacks/test_effopd.py::test_{name}"
    for name in (
        "a_candidate_must_gain_more_than_it_moves",
        "steps_are_counted_from_where_the_anchor_was_taken",
    )
)
CARRIES = " ".join(
    f"tests/callbacks/test_effopd.py::test_{name}"
    for name in (
        "an_accepted_coefficient_is_carried_over_into_the_learning_rate",
        "of_several_steps_less_is_carried_over_and_each_time_anew",
        "a_step_that_has_diverged_is_undone_moments_included",
    )
)
UNIT_METRICS = "tests/test_metrics.py"
RANDOM = "tests/test_randomness.py"
ROLLOUTS = "tests/rollouts"
EFFOPD = " ".join(
    f"tests/callbacks/test_effopd.py::{name}"
    for name in (
        "test_accept_rules_on_a_quadratic",
        "test_anchors_on_a_quadratic",
        "test_two_sided_goes_back_toward_the_anchor",
        "test_resume_keeps_the_anchor",
        "test_two_accelerators_in_one_run_are_refused",
        "test_anchors_of_different_accelerators_are_different_tensors",
        "test_anchor_and_copy_live_where_they_are_asked_to",
        "test_every_edit_of_the_weights_makes_a_new_version",
        "test_a_search_that_fails_leaves_w_and_lets_its_score_go",
        "test_a_search_computes_in_the_precision_of_the_step",
    )
)

BAD_INPUT = "tests/test_bad_input.py"
LIGHTNING = "tests/test_lightning.py"
FOLDER = "tests/test_run_folder.py"
AT_ONCE = f"{FOLDER}::test_two_runs_at_once_in_one_folder"
MEMORY = f"{FOLDER}::test_out_of_memory_saves_the_step_before_it_and_names_what_lowers_it"
STUDY = "tests/eval/test_study.py"
STUDY_GRID = f"{STUDY}::test_every_method_runs_at_each_point_of_the_grid_with_all_that_is_its_own"
STUDIES = f"{STUDY}::test_a_study_goes_on_with_trials_of_the_same_settings_only"
OPTIONS = " ".join(
    f"tests/test_resume.py::{name}"
    for name in (
        "test_a_resumed_run_takes_the_options_it_is_given",
        "test_a_schedule_is_that_of_the_configuration_whatever_the_checkpoint_had",
        "test_another_optimizer_or_student_cannot_go_on",
    )
)

answers = of("opd/answers.py", ANSWERS)
equality = of("opd/equality.py", EQUALITY)
structure = of("opd/structure.py", EQUALITY)
golds = of("opd/golds.py", EQUALITY)
mathematics = of("opd/mathematics.py", EQUALITY)
optimization = of("opd/optimization.py", f"{OPTIONS} {BAD_INPUT}")
compatibility = of("opd/compatibility.py", BAD_INPUT)
explain = of("opd/cli/explain.py", BAD_INPUT)
recipes = of("opd/cli/recipes.py", BAD_INPUT)
saving = of(
    "callbacks/checkpoint.py",
    f"{FOLDER}::test_a_resumed_run_keeps_as_many_checkpoints_as_an_unbroken_one",
)
runs = of("eval/runs.py", HAND_MADE)
report = of("eval/report.py", f"{HAND_MADE}::test_report_says_what_the_runs_cost_and_reached")
rollouts_page = of("eval/rollouts_page.py", ROLLOUTS_PAGE)
held_out_rows = of("eval/rollouts.py", ROLLOUTS_PAGE)
held_out = of("callbacks/samples.py", HELD)
evaluation = of("opd/evaluation.py", HELD)
texts = of("opd/rollouts/records.py", TEXTS)
figures = of("eval/figures.py", HAND_MADE)
study_grid = of("eval/study/grid.py", STUDY_GRID)
study_command = of(
    "eval/study/command.py", f"{STUDY}::test_a_run_stops_at_the_target_only_if_it_is_to"
)
study_trials = of("eval/study/trials.py", STUDIES)
study_medians, study_outcomes, study_pairs = (
    of("eval/study/outcomes.py", " ".join(f"{STUDY}::test_{name}" for name in names))
    for names in (
        [
            "the_median_is_known_as_far_as_its_seeds_are",
            "the_interval_is_that_of_the_bootstrap_in_closed_form",
            "seeds_that_may_need_any_number_leave_the_interval_open",
        ],
        [
            "an_outcome_is_read_off_a_run",
            "what_was_not_reached_or_not_logged_is_known_within_bounds",
            "the_mean_over_steps_is_the_mean_of_the_curve_read_at_every_moment",
        ],
        [
            "a_ratio_is_known_as_far_as_both_are",
            "methods_are_paired_by_seed_with_the_same_rate_and_with_the_best",
            "of_rates_that_never_get_there_the_most_accurate_is_the_best",
        ],
    )
)
study_results = of("eval/study/results.py", f"{STUDY}::test_study_compares_trials")
study_figures = of(
    "eval/study/figures.py",
    f"{STUDY}::test_the_figure_shows_medians_and_what_is_only_known_to_be_more",
)
many_methods = of(
    "eval/study/figures.py", f"{STUDY}::test_of_many_methods_each_has_a_row_of_medians"
)
harness = of("eval/harness.py", HARNESS)
engine_lm = of("eval/engine_lm.py", EVALUATE)
kept = of("eval/kept.py", EVALUATE)
evaluating = of("eval/evaluate.py", EVALUATE)
comparing = of("eval/compare.py", EVALUATE)
statistics = of("eval/statistics.py", "tests/eval/test_statistics.py")
memory = of("eval/memory.py", "tests/eval/test_memory.py")
ledger = of("opd/ledger.py", "tests/test_ledger.py")
metrics = of("opd/metrics.py", TOKENS)
extrapolation = of("opd/extrapolation.py", EXTRAPOLATION)
arithmetic = of("opd/embedded/arithmetic.py", "tests/test_embedded_arithmetic.py")
table = of("eval/benchmarks/table.py", TABLE)
formats = of("eval/benchmarks/formats.py", TABLE)
programs = of("eval/benchmarks/code.py", TABLE)
apps = of("opd/rewards/apps.py", VERIFIER)
verifiers = of("opd/rewards/verifier.py", VERIFIER)
rows = of("eval/benchmarks/rows.py", TABLE)
scoring = of("eval/benchmarks/scoring.py", TABLE)
problems = of("eval/benchmarks/tasks.py", TABLE)
statistics = of("eval/statistics.py", TABLE)
samples = of("callbacks/samples.py", FILES)
summary = of("callbacks/summary.py", FILES)
benchmarks = of("callbacks/benchmarks.py", BENCHMARKS)
effopd = of("callbacks/effopd.py", SEARCHES)
module = of("opd/module.py", TOKENS)
step = of("opd/step.py", STEP)
stages = of("opd/stages.py", STEP)
tokens = of("opd/tokens.py", TILES)
passes = of("opd/models/passes.py", TILES)
objective = of("opd/objectives/objective.py", "tests/objectives")
gradient = of("opd/objectives/policy_gradient.py", "tests/objectives")
teachers = of("opd/teachers/teachers.py", STEP)
reuse = of("opd/reuse.py", f"{REUSE}::test_a_step_that_is_worse_by_more_than_the_margin_is_undone")
weights = of("opd/weights.py", "tests/test_weights.py")
accelerator = of("callbacks/accelerator.py", EFFOPD)
logs = of("opd/logs.py", EFFOPD)
randomness = of("opd/randomness.py", RANDOM)
micro = of("opd/rollouts/micro_batches.py", ROLLOUTS)
scores = of("opd/scores.py", SEARCHES)
records = of("opd/rollouts/records.py", SAMPLES)
engine = of("opd/rollouts/transformers.py", ENGINE)
sampling = of("opd/rollouts/sampling.py", "tests/rollouts")
decoding = of("opd/rollouts/decoding.py", "tests/rollouts")
EXOPD = "tests/objectives/test_exopd.py"
exopd = of("opd/objectives/exopd.py", EXOPD)
WEIGHTED = "tests/objectives/test_weighted.py"
weighted = of("opd/objectives/weighted.py", WEIGHTED)
HORIZON = "tests/callbacks/test_horizon.py"
horizon = of("callbacks/horizon.py", HORIZON)
UPDATE = "tests/callbacks/test_update_geometry.py"
BY_HAND = f"{UPDATE} -k 'by_hand or expert or before_and or share or way'"
measuring = of("callbacks/geometry.py", BY_HAND)
MATRICES = "tests/eval/test_geometry_report.py"
geometry_figures = of("eval/geometry.py", MATRICES)
geometry_rows = of("opd/geometry_rows.py", MATRICES)
geometry = of("opd/geometry.py", "tests/test_geometry.py")
ANALYZE = "tests/eval/test_analyze.py"
tensors, updates, spectra, scored, judge, pages, analyze = (
    of(f"eval/analyze/{name}.py", ANALYZE)
    for name in ("tensors", "updates", "spectra", "scored", "judge", "pages", "command")
)
RESULTS = "tests/eval/test_results.py"
findings = of("eval/results/findings.py", RESULTS)
results = of("eval/results/command.py", RESULTS)
top_k = of("opd/objectives/top_k.py", "tests/objectives/test_top_k.py")
distributions = of("opd/objectives/distributions.py", UNIT_METRICS)
rollouts = of("opd/rollouts/rollouts.py", TOKENS)
teacher = of("opd/teachers/local.py", TOKENS)
divergences = of("opd/objectives/divergences.py", "tests/objectives")
loading = of("opd/models/load.py", "tests/test_loading.py")
gguf = of("opd/models/gguf.py", "tests/test_gguf.py")
generation = of("opd/models/generation.py", "tests/test_models.py")
hub = of("opd/models/hub.py", "tests/test_hub.py")
checks = of("opd/models/checks.py", "tests/test_loading.py")
checkpoint = of("opd/checkpoints.py", "tests/test_loading.py")
PAIR = "tests/test_families.py::test_a_base_student_learns_its_instruct_teachers_end_and_keeps_it"
sandbox = of("opd/rewards/sandbox.py", SANDBOX)
launcher = of("opd/rewards/launcher.py", HOSTILE)
calls = of("opd/rewards/calls.py", f"{HOSTILE} {CODE}")
code = of("opd/rewards/code.py", CODE)
loggers = of("opd/metrics_csv.py", FILES)
sources = of("opd/prompts/sources.py", PROMPTS)
prompt_format = of("opd/prompts/format.py", PROMPTS)
prompt_data = of("opd/prompts/datamodule.py", PROMPTS)
where = of("opd/prompts/where.py", PROMPTS)

CONTROLS = "tests/test_controls.py"
SCHEDULE_FREE = f"{CONTROLS}::test_schedule_free_steps_at_y_and_shows_x"
KEEPS_RATE = (
    f"{CONTROLS}::test_a_resumed_prodigy_takes_another_factor_and_keeps_the_rate_that_it_has_found"
)
AVERAGES = (
    f"{CONTROLS}::test_an_average_of_the_weights_is_saved_and_training_goes_on_without_it "
    f"{CONTROLS}::test_a_run_goes_on_bit_for_bit_whether_it_validates_or_not"
)
RANDOM_OF_TWO = f"{CONTROLS}::test_two_ranks_search_along_the_random_direction_of_one"
NORMAL = f"{CONTROLS}::test_numbers_are_normal"
ORACLE = f"{CONTROLS}::test_an_oracle_judges_by_the_validation_prompts_and_pays_for_it"
ON_A_LINE = "tests/callbacks/test_effopd.py -k on_a_line"
lookahead = of("callbacks/lookahead.py", ON_A_LINE)
ACCELERATORS = "tests/callbacks/test_accelerators.py"
LINEAR = "tests/test_linear.py"
snoo = of("callbacks/snoo.py", f"{ACCELERATORS} -k 'snoo or outer or no_sense'")
two_point = of("callbacks/two_point.py", ACCELERATORS)
relex = of("callbacks/relex.py", ACCELERATORS)
alphaopd = of("callbacks/alphaopd.py", ACCELERATORS)
once = of("callbacks/once.py", ACCELERATORS)
linear = of("opd/linear.py", LINEAR)
RELEX_LATE = f"{ACCELERATORS} -k late"
ON_TWO = f"{CONTROLS}::test_controls_hold_on_two_ranks_and_go_on_bit_for_bit"
averaging = of("callbacks/averaging.py", AVERAGES)
directions = of("opd/directions.py", f"{CONTROLS} -k a_random_direction")

ADAPTED = "tests/test_adapters.py"
ADAPTERS = f"{ADAPTED} --deselect {ADAPTED}::test_two_processes_train_the_adapter_of_one"
adapters = of("opd/models/adapters.py", ADAPTERS)
alarm = of("opd/rollouts/alarm.py", "tests/rollouts/test_alarm.py")
SERVER = "tests/rollouts/test_server.py -k 'not run and not rank'"
server = of("opd/rollouts/server.py", SERVER)
servers = of("opd/servers.py", SERVER)
stream = of("opd/rollouts/weight_stream.py", SERVER)
SERVED = "tests/test_served_teachers.py -k 'not a_rank'"
served = of("opd/teachers/served.py", SERVED)
CONVERSATIONS = "tests/rollouts/test_conversations.py -k 'not runs_with'"
conversations = of("opd/rollouts/conversations.py", CONVERSATIONS)
AHEAD = "tests/rollouts/test_server.py -k samples_each_step"
BEHIND = "tests/test_reuse.py::test_completions_of_a_step_before_are_weighed_too"
KNOWS_MORE = "tests/test_tokens.py::test_a_teacher_that_knows_more_reads_its_own_prompt"
BASE_TEACHER = f"{ADAPTED} -k base_as_teacher"

PROBE = "tests/objectives/test_probe.py"
probe = of(
    "opd/objectives/probe.py",
    f"{PROBE} --deselect {PROBE}::test_a_run_ends_before_it_begins",
)
REWARD = "tests/rewards/test_reward.py"
REWARDS = f"{REWARD} --deselect {REWARD}::test_two_processes_give_the_rewards_that_one_gives"
reward = of("opd/rewards/reward.py", REWARDS)
advantages = of("opd/rewards/advantages.py", f"{REWARD} -k advantage")
RL = "tests/rewards/test_rl.py"
GRPO_STEPS = f"{RL}::test_three_steps_on_a_batch_are_those_of_the_loss_written_out"
DYNAMIC = f"{RL}::test_sampling_goes_on_until_enough_prompts_differ"
ALL_RANKS = f"{RL}::test_prompts_are_taken_in_the_order_of_all_ranks"
BESIDE = f"{RL}::test_a_teacher_that_is_named_is_measured_and_not_trained_on"
ALONE = f"{RL}::test_a_recipe_runs_without_a_teacher"
TWO_OF_RL = f"{RL}::test_two_processes_give_the_numbers_of_one[grpo-ddp]"
NO_TEACHER = f"{RL}::test_predictions_and_validation_need_no_teacher"
RL_INPUT = f"{BAD_INPUT} -k 'rl or Clipped or null'"
rl = of("opd/rewards/reward.py", f"{RL} -k 'overlong or shares or rewards'")
clipped = of("opd/objectives/clipped.py", "tests/objectives/test_clipped.py")
PPO = "tests/rewards/test_ppo.py"
PPO_STEPS = f"{PPO} -k 'hand or fit or converges or scale or alike'"
critic = of("opd/rewards/critic.py", PPO_STEPS)
PPO_INPUT = f"{BAD_INPUT} -k ppo"
MIXED = "tests/test_mixture.py"
MIXTURE = f"{MIXED} --deselect {MIXED}::test_two_processes_mix_as_one_does"
mixture = of("opd/mixture.py", MIXTURE)
DRIFT = f"{WEIGHTED} -k drift"
RENDERED = " ".join(
    f"{PROMPTS}::test_{name}"
    for name in (
        "each_prompt_is_rendered_by_its_own_teacher_for_it",
        "a_template_of_a_teacher_must_make_something_of_prompts",
        "arguments_that_a_teacher_s_template_does_not_know_are_not_missed",
    )
)
OF_STEPS = "tests/test_step.py"
READERS = (
    f"{OF_STEPS}::test_own_renderings_of_a_run "
    f"{OF_STEPS}::test_a_teacher_of_another_vocabulary_renders_nothing "
    f"{OF_STEPS}::test_readers_are_named_as_prompts_name_them"
)

MUTANTS = [
    # prompts
    sources('encoding="utf-8-sig"', 'encoding="utf-8"'),
    sources("if len(row) < len(pairs):", "if False:"),
    sources("if len(digits) > MAX_DIGITS:", "if len(digits) > 2 * MAX_DIGITS:"),
    sources("name, split=split, revision=revision)", "name, split=split, revision=None)"),
    where("isinstance(value, bool) == isinstance(wanted, bool)", "True"),
    where("else [wanted]", "else [str(wanted)]"),
    where('">=": operator.ge', '">=": operator.gt'),
    where("isinstance(value, int | float) and not", "True and not"),
    prompt_format('if self.system_turns == "drop":', "if False:"),
    prompt_format("last = max(", "last = min("),
    prompt_format("first_row + numbers[i]", "first_row + i"),
    prompt_format("number + first}", "first}"),
    prompt_data("first_row += part.count", "first_row += len(part.rows)"),
    prompt_data("place = bisect.bisect_left(part.numbers, prompt.row - first_row)", "place = 0"),
    prompt_format('turns[0]["role"] not in SYSTEM', "True"),
    prompt_format("    return turns[:kept]", "    return turns[:-1]"),
    prompt_format('"".join(texts)', '" ".join(texts)'),
    prompt_format("    if name in row:\n        return row[name]\n", ""),
    prompt_format("if isinstance(value, bool) or not", "if not"),
    prompt_format(
        "one.turns is None and not _begins_with_bos(one.text, tokenizer)", "one.turns is None"
    ),
    prompt_format("named = role in ROLES or", "named = True or"),
    prompt_format(
        "by_template(others, place, tokenizer) == text",
        "by_template(others, place, tokenizer) == ''",
    ),
    prompt_format("text.rstrip().endswith(mark)", "text.endswith(mark)"),
    prompt_format("if value_of(row, name) is None}", "if name not in row}"),
    prompt_data('state["epoch"], state["prompts"]', 'self.epoch, state["prompts"]'),
    prompt_data('state["position"] * self.batch_size', 'state["position"]'),
    prompt_data("[len(prompt.token_ids), *prompt.token_ids]", "[*prompt.token_ids]"),
    prompt_data(
        "self._short(tokenized, part.source)[:limit]", "self._short(tokenized, part.source)"
    ),
    teachers("if self.name_of(prompt) != name:", "if False:", "tests/test_models.py"),
    teachers("if list(prompt.token_ids) != theirs:", "if theirs:", "tests/test_models.py"),
    # metrics of data sets and teachers
    metrics("value[chosen.to(value.device)]", "value", UNIT_METRICS),
    stages("members(module, metrics, answered)", "{}"),
    module("{**self._measured, **self.ledger.metrics()}", "self.ledger.metrics()", TWO),
    # answers
    answers("return found[-1] if found", "return found[0] if found"),
    answers("found[-1].group(1)", "found[0].group(1)"),
    answers("answer is not None and self.same", "self.same"),
    answers("if not answer.strip() or not reference.strip():", "if False:"),
    answers("if tolerance or unit:", "if False:", EQUALITY),
    answers('if self.equivalence == "number":', "if False:", "tests/test_answers.py"),
    answers("            found.append(None)\n", "            found.append(0)\n", EQUALITY),
    answers("groups[text] == len(firsts)", "True", EQUALITY),
    equality(
        "    if left == right:\n        return True\n    left, right = (t",
        "    left, right = (t",
        ANSWERS,
    ),
    equality('.lstrip("$").rstrip("$.")', '.lstrip("$").rstrip("$")', ANSWERS),
    equality(
        '.lstrip("$").rstrip("$.")',
        '.strip("$.")',
        ANSWERS,
        why="no number starts with a full stop",
    ),
    equality(r'r"\s+(?!\d)|(?<!\d)\s+"', r'r"\s+"', ANSWERS),
    equality("if not answer or not reference:", "if False:"),
    equality("<= (tolerance or 0)", "< (tolerance or 1)"),
    equality("self.unordered(_elements(left), right.parts, self.tolerances)", "True"),
    equality("place(partner[j], tried)", "False"),
    equality("if j not in partner or place", "if True or place"),
    equality("if len(left) != len(right):", "if len(left) > len(right):"),
    equality("return len(names) < 2 or all", "return True or all"),
    equality('        if left.kind == "set":\n            a = self.distinct(a)\n', ""),
    equality("left_unit and right_unit and left_unit != right_unit", "False"),
    equality("right_unit = right_unit or self.unit", "pass"),
    equality("if left.name and right.name and left.name != right.name:", "if False:"),
    equality(
        "self.seconds -= spent", "pass", why="the process has its own limit for each question"
    ),
    equality("if len(cases[0] | cases[1]) > 1:", "if False:"),
    equality("if any(_NOT_CALCULATED.search(text) for text in (left, right)):", "if False:"),
    equality("if int(found[2]) < int(found[3])", "if False"),
    equality(r'return _PRODUCT.sub(r"\\cdot ", text)', "return text"),
    equality("        if left.kind != right.kind:\n            return False\n", ""),
    equality("plain.casefold() if", "plain if"),
    structure('text.replace(r"\\pm", "-").replace(r"\\mp", "+")', 'text.replace(r"\\pm", "-")'),
    structure("if len(items) > 1:", "if len(items) > 2:"),
    structure('kind in ("()", "{}") and len(parts) == 1', 'kind == "{}" and len(parts) == 1'),
    structure("parts[::-1], signs[::-1]", "parts[::-1], signs"),
    structure('("(" if signs[0] == "<" else "[")', '("(" if signs[1] == "<" else "[")'),
    structure("if depth < 0:", "if False:", why="brackets that do not match end in no equality"),
    golds("if opened > closed else", "if False else", EQUALITY),
    golds("    for _ in range(10):", "    for _ in range(1):", EQUALITY),
    golds(r'r"\1 \\times 10^{\2}"', r'r"\1e\2"', EQUALITY),
    mathematics("signal.setitimer(signal.ITIMER_PROF, seconds)", "pass"),
    mathematics("real + sympy.I * imaginary", "real"),
    mathematics("if type(a) is not type(b) or", "if"),
    mathematics("if inequality and not", "if False and not"),
    mathematics("part.is_Float and part._prec == 1", "False"),
    # statistics
    statistics("math.comb(n - c, k)", "math.comb(n - c + 1, k)"),
    statistics("for group in groups if group is not None)", "for group in groups)"),
    statistics("others[0][1] == most", "others[0][1] <= most"),
    statistics(
        "(winner, most), *others = votes.most_common()",
        "*others, (winner, most) = votes.most_common()",
    ),
    statistics("n.bit_length())", "n.bit_length() - 1)"),
    statistics("(n - 1) / n) if", "n / n) if"),
    statistics("_student(n - 1) * stderr", "1.96 * stderr"),
    statistics("< FEW:", "< 0:"),
    statistics("FEW = 6", "FEW = 1"),
    statistics("unseen * (mean - bounds[0])", "unseen * mean"),
    statistics("max(high, estimate.high)", "estimate.high"),
    statistics("(-1.0, 1.0) if share", "(0.0, 1.0) if share"),
    statistics("a[problem] - b[problem] for", "b[problem] - a[problem] for"),
    statistics("math.hypot(*parts) / tasks", "math.hypot(*parts)"),
    statistics("mean - down, mean + up", "mean - up, mean + down"),
    statistics("sum(not one for one in answered)", "sum(answered)"),
    # the ledger
    ledger("self._new[name] += tokens", "self._new[name] = tokens"),
    ledger("+= _seconds(start, end)", "= _seconds(start, end)"),
    ledger("+= _seconds(start, end)", "+= end"),
    ledger("self.totals[name] += value", "self.totals[name] = value"),
    ledger("        self._new.clear()\n", ""),
    ledger('if name.endswith("seconds")', 'if name.endswith("tokens")'),
    ledger("(world_size if", "(1 if"),
    ledger("reduce_sum(new).tolist()", "new.tolist()"),
    ledger("ru_maxrss * 1024", "ru_maxrss"),
    ledger(
        "        try:\n            yield\n        finally:\n", "        yield\n        if True:\n"
    ),
    # metrics of tokens
    metrics(
        "(both.teacher_entropy - both.student_entropy).abs()",
        "both.teacher_entropy - both.student_entropy",
    ),
    metrics("OVERLAP_K = 16", "OVERLAP_K = 15"),
    metrics("(teacher - student)", "(student - teacher)"),
    metrics("(student.exp() * (", "(teacher.exp() * ("),
    metrics("log_q.gather(1, ids_p).masked_fill(~shared, lowest)", "log_q.gather(1, ids_p)"),
    metrics("_, ids_q = largest(log_q, k)", "_, ids_q = largest(log_p, k)"),
    metrics("self.counts[i] += value.numel()", "self.counts[i] += 1"),
    metrics("self.totals[i] += value.sum(", "self.totals[i] += value.mean("),
    metrics("total / count if name in self.means else total", "total / count"),
    metrics("torch.maximum(self.highest[i], value.max())", "value.max()", "tests/test_metrics.py"),
    metrics("torch.maximum(self.highest[i]", "torch.minimum(self.highest[i]"),
    divergences("(log_p.exp() * (log_p - log_q))", "(log_q.exp() * (log_p - log_q))"),
    divergences("return kl(log_p, log_q)", "return kl(log_q, log_p)"),
    divergences("mixture(log_q, log_p, beta)", "mixture(log_p, log_q, beta)"),
    divergences("mixture(log_p, log_q, alpha)", "mixture(log_q, log_p, alpha)"),
    divergences(
        "return beta * kl(log_q, log_m) + (1 - beta)", "return (1 - beta) * kl(log_q, log_m) + beta"
    ),
    # extrapolation
    extrapolation("step > 0 and step & (step - 1) == 0", "step > 0 and step % 2 == 0"),
    extrapolation("step > 0 and step % whole == 0", "step > 0 and step % whole == 1"),
    extrapolation("self.fixed(t) or (", "self.fixed(t) and ("),
    extrapolation("t >= self.coming", "t > self.coming"),
    extrapolation("min(self.interval * 2, self.limit)", "self.interval * 2"),
    extrapolation("elif not 0.5 <= 1 + coefficient <= 2:", "elif not 0.5 < 1 + coefficient < 2:"),
    extrapolation("max(self.interval // 2, 1)", "self.interval // 2"),
    extrapolation("self.coming = t + self.interval", "self.coming = t + 1"),
    extrapolation("any(due(step) for", "all(due(step) for"),
    extrapolation("max(limit for", "min(limit for"),
    extrapolation("coefficient <= limit and (yield", "coefficient < limit and (yield"),
    extrapolation("coefficient *= 2\n\n\ndef two_sided", "coefficient += 2\n\n\ndef two_sided"),
    extrapolation("if coefficient == 1.0:", "if coefficient <= 2.0:"),
    extrapolation("first_bracket() if first else", "first_bracket() if not first else"),
    extrapolation("while length <= limit and", "while length < limit and"),
    extrapolation("    if length > 2.0:\n        return\n", ""),
    extrapolation("while length >= 1 / limit:", "while length > 1 / limit:"),
    extrapolation("    yield -1.0\n\n", "\n"),
    extrapolation("if found and not accepted:", "if not accepted:"),
    extrapolation("found = found or accepted", "found = accepted"),
    extrapolation("comparison.difference >= 0", "comparison.difference > 0"),
    extrapolation("difference > errors", "difference >= errors"),
    extrapolation("errors = margin or 0.0", "errors = 0.0"),
    extrapolation(
        "-math.inf if broken_here else math.inf", "math.inf if broken_here else -math.inf"
    ),
    extrapolation("if self.coefficient > -1:", "if self.coefficient >= -1:"),
    extrapolation("default=1.0) / 2", "default=1.0)"),
    extrapolation("return total / weight if", "return total / self.values.numel() if"),
    extrapolation("self.values.double() - best.values", "best.values.double() - self.values"),
    extrapolation("/ max(n - 1, 1)", "/ n"),
    extrapolation("(n * variance) ** 0.5 / units", "variance ** 0.5 / units"),
    extrapolation("total / units, (n", "total / n, (n"),
    extrapolation(
        "best, result.score_after, result.coefficient = score, value,",
        "result.score_after, result.coefficient = value,",
    ),
    extrapolation("    if length == 0.0:", "    if length is None:"),
    extrapolation("from_anchor = coefficient < -0.5", "from_anchor = False"),
    extrapolation(
        "torch._foreach_sub_(targets, _beside(targets, anchor))",
        "torch._foreach_add_(targets, _beside(targets, anchor))",
    ),
    extrapolation("_foreach_mul_(targets, length)", "_foreach_mul_(targets, 2 * length)"),
    extrapolation("    copy_weights(targets, base)\n", ""),
    extrapolation(".double()).square().sum()", ".double()).abs().sum()"),
    extrapolation("torch.stack(squares).sum()", "torch.stack(squares).max()"),
    extrapolation("if any(word in name for word", "if all(word in name for word"),
    # the built-in task
    arithmetic("int(a) + int(b) + carry", "int(a) + int(b)"),
    arithmetic('f"{a}{b}{digit}c{carry}"', 'f"{b}{a}{digit}c{carry}"'),
    arithmetic('digits = f"{digit}{digits}"', 'digits = f"{digits}{digit}"'),
    arithmetic("if generator.random() < slip", "if generator.random() > slip"),
    arithmetic("randint(1, 9)", "randint(0, 9)"),
    arithmetic('return "test" if key', 'return "train" if key'),
    arithmetic("< _TEST_RESIDUES", "<= _TEST_RESIDUES"),
    arithmetic("sum(self.numbers)", "sum(self.numbers[:2])"),
    arithmetic("{DIGITS + 1}d", "{DIGITS}d"),
    arithmetic(
        "        if problem.split == split:\n            yield",
        "        if problem:\n            yield",
    ),
    arithmetic('f"{split}:{seed}:{DIGITS}"', 'f"{split}:{DIGITS}"'),
    # benchmarks
    table("None if revision == NONE_SEEN else revision", "revision"),
    table("int(memory * 2**30)", "int(memory * 10**9)"),
    table("if unknown := sorted(map(str, set(given) - known)):", "if unknown := sorted([]):"),
    table("value is not None and value < 1", "value is not None and value < 0"),
    table("(isinstance(value, bool) and kind is not bool)", "False"),
    formats("rpartition(benchmark.answer_after)[2]", "partition(benchmark.answer_after)[0]"),
    formats("gold[0] if isinstance(gold, list) else gold", "gold"),
    formats("str(option).strip() for option", "str(option) for option"),
    formats("LETTERS[order.index(0)]", "LETTERS[order[0]]"),
    formats("hashlib.sha256(identity.strip().encode()).digest()", "str(hash(identity)).encode()"),
    formats("% len(orders)]", "% 6]"),
    formats('[record.get("context"), record["problem"]]', '[record["problem"]]'),
    programs("check({function})", "check"),
    programs('*_texts(record["imports"] or [])', "*[]"),
    programs("setup=problem, ", ""),
    programs('if not first <= _day(record["date"]) <= last:', "if False:"),
    programs("if not first <= _day(", "if not first < _day("),
    programs('<= _day(record["date"]) <= last', '<= _day(record["date"]) < last'),
    programs('kind: Kind = "call" if function else "stdin"', 'kind: Kind = "stdin"'),
    programs("cases += [_case(case, kind) for case in json.loads(private)]", "pass"),
    programs('(*map(tuple, fields["cases"]), *more)', 'tuple(map(tuple, fields["cases"]))'),
    programs('(*map(tuple, fields["cases"]), *more)', "tuple(more)"),
    programs('raise ValueError(f"compressed tests ask for {module}.{name}")', "return print"),
    programs("if not stream.eof:", "if False:"),
    programs("if not start.startswith(pickle.PROTO):", "if False:"),
    programs("_begins_well(packed)", "pass"),
    apps("output[0] if single else output", "output"),
    apps("if not pairs:", "if False:", TABLE),
    programs('if record["interaction"]:', "if False:"),
    programs('not record["complete"] or not cases', "not cases"),
    programs('not record["complete"] or not cases', 'not record["complete"]'),
    programs('(record["mode"] or "stdio") != "stdio"', "False"),
    programs("int(float(memory) * 2**20)", "int(float(memory) * 10**6)"),
    programs('checker=record["checker"] or ""', 'checker=""'),
    programs('("Note", record["note"]),', ""),
    apps('*(f"from {module} import *"', '*(f"import {module}"'),
    rows("if count <= benchmark.rows:", "if True:"),
    rows("if count != benchmark.rows:", "if count < benchmark.rows:"),
    rows("if count != benchmark.rows:", "if count > benchmark.rows:"),
    rows("if len(found) > 1:", "if False:"),
    rows(
        "paths = sorted(path for path in",
        "paths = list(path for path in",
    ),
    rows("!= benchmark.copy.sha256", "== ''"),
    rows(
        "benchmark.config, split=benchmark.split, revision=revision",
        "benchmark.config, split=benchmark.split",
    ),
    rows('name, repo_type="dataset", revision=revision', 'name, repo_type="dataset"'),
    scoring('unit=doc.get("unit") or None', "unit=None"),
    scoring('tolerance=doc.get("tolerance") or None', "tolerance=None"),
    scoring("completion if boxed is None else boxed", "completion"),
    scoring("_LETTER.fullmatch(", "_LETTER.search("),
    scoring('answer is not None and answer == doc["reference"]', "answer is not None"),
    scoring("if self.verifier is None:", "if False:"),
    scoring("CodeScorer(sandbox) if benchmark", "CodeScorer() if benchmark"),
    problems("if identity in docs:", "if False:"),
    problems("if empty and name not in", "if False and name not in"),
    problems("len(docs) != benchmark.problems", "False"),
    problems("if first is not None and not", "if False and not"),
    problems("left_out[str(reason)] += 1", "left_out[str(reason)] = 1"),
    problems("verdict_of(completion) or scorer(completion, doc)", "scorer(completion, doc)"),
    problems("verdict.answer is not None for", "verdict.right for"),
    statistics('f"avg@{n}": c / n', 'f"avg@{n}": float(right[0])'),
    statistics('f"avg@{n}": c / n', 'f"avg@{n}": float(any(right))'),
    # eval: runs
    runs(
        "return next((p for p in self.points if (p.accuracy or 0.0) >= accuracy), None)",
        "return self.points[-1]",
    ),
    runs("for p in self.points if", "for p in reversed(self.points) if"),
    runs("(p.accuracy or 0.0) >= accuracy", "(p.accuracy or 0.0) > accuracy"),
    runs(
        'PHASES = ("rollout", "teacher", "train", "search")',
        'PHASES = ("rollout", "teacher", "train")',
    ),
    runs('"search")', '"search", "validation")'),
    runs(' + costs["search_generated_tokens"]', ""),
    runs('"rollout_tokens", "search_gen', '"rollout_tokens", "search_'),
    runs("Point(step, **found,", 'Point(step, found["reverse_kl"], found["accuracy"],'),
    runs("seconds=seconds, tokens=tokens", "seconds=tokens, tokens=seconds"),
    runs('folder / "evaluation" / "results.json"', 'folder / "results.json"'),
    # eval: report
    report("cost['rollout_tokens'] + cost['search_generated_tokens']", "cost['rollout_tokens']"),
    report("cost['search_generated_tokens']", "cost['search_tokens']"),
    runs('["cost"]["search_seconds"]', '["cost"]["train_seconds"]'),
    runs('_seconds"] for phase in PHASES))', '_seconds"] for phase in PHASES[:3]))'),
    report('(pair["initial"], pair["final"])', '(pair["final"], pair["initial"])'),
    report('run.summary["accuracy"]', 'run.summary["reverse_kl"]'),
    report("str(reached.step) if", "str(run.points[-1].step) if"),
    report("_seconds(reached) if", "_seconds(run.points[-1]) if"),
    report("run.benchmarks[n]:.3f", "run.benchmarks[n]:.1f"),
    report("c['score']:.3f", "c['coefficient']:.3f"),
    report("{kept:g}", "{-kept:g}"),
    report('"-" if kept is None else', '"refused" if kept is None else'),
    report("accepted = sum(map(bool, decided))", "accepted = len(decided)"),
    report("{len(decided)} searches", "{len(rows)} searches"),
    figures('if search.get("coefficient") is None:', "if False:"),
    # eval: figures
    figures('(axes[1, 0], "seconds"', '(axes[1, 0], "tokens"'),
    figures('(axes[0, 1], "step", "reverse_kl"', '(axes[0, 1], "step", "accuracy"'),
    figures('(axes[2, 0], "step", "student_entropy"', '(axes[2, 0], "step", "kl_above_5"'),
    figures('marker="^" if accepted', 'marker="^" if not accepted'),
    figures("share * (getattr(right, y)", "(1 - share) * (getattr(right, y)"),
    figures("(step - left.step) / (right.step", "(right.step - step) / (right.step"),
    # eval: study
    study_grid('*settings, "--model.optimizer.lr", rate', '"--model.optimizer.lr", rate'),
    study_grid("rates = learning_rates\n", "rates = [1e-3]\n"),
    study_grid('{"configs": value}', '{"configs": None}'),
    study_grid("tuple(arguments),", "(),"),
    study_command("*method.arguments, *trial.arguments", "*trial.arguments", STUDY_GRID),
    study_command("*arguments, *method.arguments", "*method.arguments, *arguments", STUDY_GRID),
    study_command("    if stop_at_target:\n", "    if True:\n"),
    study_command("    if stop_at_target:\n", "    if False:\n"),
    study_trials("if earlier == made_with:", "if earlier:"),
    study_trials("if ADVICE not in said or", "if True or", f"{STUDY}::test_a_small_study_runs"),
    study_trials(
        "if ADVICE not in said or", "if", f"{STUDY}::test_after_a_failure_no_trial_begins"
    ),
    study_outcomes('run.summary["steps"] if reached else max_steps', 'run.summary["steps"]'),
    study_command("map(fingerprint, command)", "command", STUDIES),
    study_trials(
        "pool.shutdown(cancel_futures=True)",
        "pool.shutdown(wait=False, cancel_futures=True)",
        f"{STUDY}::test_after_a_failure_no_trial_begins",
    ),
    study_medians("ordered[(n - 1) // 2] + ordered[n // 2]", "ordered[n // 2] + ordered[n // 2]"),
    study_medians("(1 - CONFIDENCE) / 2)", "(1 - CONFIDENCE))"),
    study_medians("medians[-1 - tail, 1]", "medians[-1 - tail, 0]"),
    study_medians("size=(RESAMPLES, len(values))", "size=(RESAMPLES, 2)"),
    study_outcomes("steps=reached.step if", "steps=run.points[-1].step if"),
    study_outcomes("tokens=reached.tokens if", "tokens=run.points[-1].tokens if"),
    study_outcomes("seconds=reached.seconds if", "seconds=reached.tokens if"),
    study_outcomes("search_share=run.search_share or", "search_share=1.0 or"),
    study_outcomes("final_accuracy=accuracies[-1][1]", "final_accuracy=accuracies[0][1]"),
    study_outcomes("min(kl for _, kl in kls)", "max(kl for _, kl in kls)"),
    study_outcomes("curve[-1][0] < steps", "False"),
    study_outcomes("(b - a) * (u + v) / 2", "(b - a) * v"),
    study_outcomes("if self.steps is None else Bounds(0.0, spent)", ""),
    study_pairs("_divide(a.low, b.high)", "_divide(a.low, b.low)"),
    study_pairs("_divide(a.high, b.low)", "_divide(a.high, b.high)"),
    study_pairs("-statistics.median(accuracies)", "statistics.median(accuracies)"),
    study_pairs("return steps.high, steps.low,", "return -steps.high, steps.low,"),
    study_pairs("else [*same, at_best]", "else same"),
    study_pairs("if at_best in same else", "if same else"),
    study_results("statistics.median(known)", "statistics.mean(known)"),
    study_results("o.steps is not None for o", "o.steps is None for o"),
    study_results('return f">{low}" if value.low', 'return f"{low}" if value.low'),
    study_results("max(rises)", "min(rises)", f"{STUDY}::test_a_late_swing_of_one_seed_shows"),
    study_figures('marker, "markersize": 5} if known_to_be', "marker} if not known_to_be"),
    study_figures("axis.fill_between(rates, lows, highs", "axis.fill_between(rates, lows, lows"),
    study_figures("if several and len(rates) == 1", "if several and not rates"),
    many_methods("return low, min(far, high)", "return value.value.low, min(far, high)"),
    many_methods("if _is_known(value) else UNKNOWN |", "if not _is_known(value) else UNKNOWN |"),
    many_methods("len(methods) - 0.5, -0.5", "-0.5, len(methods) - 0.5"),
    many_methods("own.index(group.learning_rate) -", "-own.index(group.learning_rate) +"),
    of("eval/study/results.py", f"{STUDY} -k means_are_compared")("if whole and any", "if any"),
    study_figures(
        "set.intersection(*map(set, seeds))",
        "set.union(*map(set, seeds))",
        f"{STUDY}::test_curves_show_each_seed_and_their_median",
    ),
    # eval: harness and memory
    runs('if is_score and not metric.endswith("_stderr")', "if is_score", HARNESS),
    runs('and metric != "sample_len"', "", HARNESS),
    runs(' if not name.endswith("/before")', ""),
    harness('"take_first_k", "k": copies', '"take_first_k", "k": 1'),
    harness('"repeats": copies', '"repeats": 1'),
    harness("limit=settings.limit,", "limit=None,"),
    harness("system_instruction=settings.system_prompt,", ""),
    harness("if programs and not settings.allow_code_execution:", "if False:", BAD_INPUT),
    harness("if others and (settings.samples or 1) > 1:", "if False:", BAD_INPUT),
    engine_lm("chunks[rank::size]", "chunks"),
    engine_lm("item.key not in known", "True"),
    engine_lm("            copies[problem] += 1\n", ""),
    engine_lm("(self.identity, how, prompt, self.seed)", "(how, prompt, self.seed)"),
    engine_lm("(self.identity, how, prompt, self.seed)", "(self.identity, prompt, self.seed)"),
    engine_lm("(self.identity, how, prompt, self.seed)", "(self.identity, how, prompt)"),
    engine_lm('"evaluate", task, problem, copy)', '"evaluate", task, problem)'),
    engine_lm("new_tokens = context - longest", "pass"),
    engine_lm('if options.get("do_sample") else 0.0', ""),
    engine_lm("(not e for e in ended)", "ended"),
    engine_lm("torch.manual_seed(items[0].seed)", "torch.seed()", "tests/test_families.py"),
    of("eval/files.py", EVALUATE)("if file.tell() and not _ends_a_line(path):", "if False:"),
    kept("self._completions.setdefault(task, {}).update(generated)", "pass"),
    kept("(record.pop(name) for name in KEY)", "(record[name] for name in KEY)"),
    kept('digest = record.pop("digest")', 'digest = record["digest"]'),
    kept('shutil.rmtree(self.folder / "verdicts", ignore_errors=True)', "pass"),
    engine_lm("if digest not in known}", "}"),
    of("eval/files.py", EVALUATE)("                place.rmdir()", "                pass"),
    of("opd/world.py", UNJUDGED)("if reason is not None:", "if False:"),
    evaluating("name.strip() for name in tasks.split", "name for name in tasks.split", HARNESS),
    evaluating("{**said, **over, **always}", "{**over, **said, **always}"),
    evaluating("if folder is not None and not overwrite:", "if False:"),
    evaluating("config[name] == value for name", "True for name"),
    evaluating("public = task not in own or not own[task].gated", "public = True"),
    comparing("paired_difference(b[task], a[task])", "paired_difference(a[task], b[task])"),
    comparing('sample.get("id", sample["doc_id"])', 'sample["doc_id"]'),
    memory(
        "MASTER, GRADIENT, ADAM, COPY = 4, 4, 8, 4", "MASTER, GRADIENT, ADAM, COPY = 4, 4, 4, 4"
    ),
    memory("(COPY if effopd else 0))\n", "COPY)\n"),
    memory("(student if whole_gradients else share)", "share"),
    memory('strategy == "ddp" or gradient_sync', "gradient_sync", why="DDP's share is the whole"),
    memory("0 if teacher_offload else", "0 if not teacher_offload else"),
    memory("share * (GRADIENT + COPY)", "share * GRADIENT"),
    memory("(share * COPY if effopd else 0) + gathered", "gathered"),
    memory("return max(self.rollout", "return min(self.rollout"),
    # files of a run
    samples("step % self.every_n_steps:", "step % self.every_n_steps == 0:"),
    samples("write_jsonl(path, records[: self.rollouts])", "write_jsonl(path, records)"),
    samples(
        "micro.spread(token_kl)",
        "micro.spread(-token_kl)",
        f"{NUMBERS}::test_samples_hold_the_kl_of_every_token",
    ),
    samples(
        "                break\n", "                continue\n", why="the rest is cut off anyway"
    ),
    samples(
        'file.writelines(json.dumps(record) + "\\n" for record in outputs)',
        "file.write(json.dumps(outputs[0]))",
        PREDICTIONS,
    ),
    summary("self.final = results", "self.final = self.final or results"),
    summary("self.initial = results", "self.final = results"),
    summary(
        '{"initial": self.initial.get(name), "final": self.final.get(name)}',
        '{"initial": self.final.get(name), "final": self.initial.get(name)}',
    ),
    summary(
        "self.validated_step != trainer.global_step", "self.validated_step == trainer.global_step"
    ),
    summary('self._change("accuracy")', 'self._change("reverse_kl")'),
    summary('"steps": trainer.global_step', '"steps": self.validated_step', SUMMARY),
    summary('"seed": getattr(pl_module, "seed", None)', '"seed": 0', SUMMARY),
    summary("for search in history]", "for search in history[:1]]", SEARCHES),
    summary("trainer.fit_loop.epoch_loop.val_loop.run()", "pass"),
    summary(
        'state_dict["initial"], state_dict["final"]', 'state_dict["final"], state_dict["final"]'
    ),
    benchmarks("if self.due(t) or t == trainer.max_steps:", "if self.due(t):"),
    benchmarks("if self.due(t) or t == trainer.max_steps:", "if True:"),
    benchmarks("limit=self.limit", "limit=1"),
    benchmarks("return  # has been done", "pass", SEARCHED),
    benchmarks("rank=world.rank, world_size=world.size", "", RANKS),
    loggers("< int(row", "<= int(row"),
    loggers("if first:", "if not first:"),
    loggers(":.8g", ":.2g"),
    records('"stop" if finished[i]', '"length" if finished[i]'),
    records(
        "value_rows[i][: lengths[i]]",
        "value_rows[0][: lengths[i]]",
        f"{NUMBERS}::test_samples_hold_the_kl_of_every_token",
    ),
    # EffOPD
    effopd('base if self.anchor_kind == "raw"', 'base if self.anchor_kind != "raw"'),
    effopd("float(len(result.tried))", "float(len(result.tried)) + 1"),
    scores("return Score(right.mean(dim=1)", "return Score(1 - right.mean(dim=1)"),
    scores(
        'module.ledger.count("search_generated_tokens", rollouts.num_tokens)\n        return',
        "return",
        FRESH,
    ),
    # rollouts
    sampling("logits /= sampler.temperature", "pass", ENGINE),
    sampling("if sampler.top_k > 0:", "if sampler.top_k > 99:", ENGINE),
    sampling("(_of(weights, chosen) / total).log()", "_of(weights, chosen).log()", ENGINE),
    engine("            in_eval_mode(model),\n", "", DROPOUT),
    rollouts(
        "self.prompts.ids.shape[1] - 1 : -1] = self.mask",
        "self.prompts.ids.shape[1] :] = self.mask",
    ),
    # a step
    module("self.evaluation_metrics.reset()", "pass", VALIDATION),
    # answers, as they are judged in time
    answers("return bool(verdict)", "return not bool(verdict)", "tests/test_answers.py"),
    equality("a is not None and a == _as_decimal(right)", "a == _as_decimal(right)", ANSWERS),
    equality("a is not None and a == _as_decimal(right)", "a is not None", ANSWERS),
    equality("ratio is not None and ratio == _as_ratio(right)", "ratio is not None", ANSWERS),
    answers("if boxed and begin > start:", "if boxed and start < 0:"),
    answers("if boxed and begin > start:", "if begin > start:"),
    equality('t.replace(",", "") if _GROUPED.fullmatch(t)', 't.replace(",", "") if t', ANSWERS),
    equality("shift + int(match[4] or 0)", "shift", ANSWERS),
    equality(
        'whole, fraction = match[2], match[3] or ""', 'whole, fraction = match[2], ""', ANSWERS
    ),
    answers("(?<![\\d)])[-+]", "[-+]", f"tests/test_answers.py::{COMMA}"),
    answers('_NUMBER = re.compile(rf"{_SIGN}', '_NUMBER = re.compile(rf"'),
    # metrics of tokens, and of what searches and predictions look at
    metrics(
        '"opd/reverse_kl": both.reverse_kl,\n            "',
        '"opd/reverse_kl": both.forward_kl,\n            "',
    ),
    metrics('"opd/forward_kl": both.forward_kl', '"opd/forward_kl": both.reverse_kl'),
    distributions("(self.p * self.ratio)", "(self.q * self.ratio)"),
    distributions("-(self.q * self.ratio)", "(self.q * self.ratio)"),
    distributions("-(self.p * self.log_p)", "-(self.p * self.log_q)"),
    distributions("-(self.q * self.log_q)", "-(self.q * self.log_p)"),
    metrics(
        'values["opd/teacher_logprob"] = _teacher_logprob(both, tokens)',
        'values["opd/teacher_logprob"] = of_sampled(both.log_p, tokens.y)',
    ),
    metrics("- tokens.logmu_y).abs()", "- tokens.logmu_y)", UNIT_METRICS),
    metrics('"opd/overlap_at_16": overlap,', '"opd/overlap_at_16": advantage,'),
    metrics('": lambda both: both.reverse_kl,', '": lambda both: both.forward_kl,', SCORES),
    metrics('": lambda both: both.forward_kl,', '": lambda both: both.reverse_kl,', SCORES),
    metrics("both.reverse_kl + both.forward_kl,", "both.reverse_kl - both.forward_kl,", SCORES),
    metrics("both.reverse_kl > FAR", "both.reverse_kl < FAR", UNIT_METRICS),
    metrics("FAR = 5.0", "FAR = 5.02", UNIT_METRICS),
    metrics("log_ratio = log_p_y - logmu_y", "log_ratio = logmu_y - log_p_y", UNIT_METRICS),
    metrics("return log_ratio.expm1() - log_ratio", "return -log_ratio", UNIT_METRICS),
    stages('spread(found["moved"])', 'spread(found["divergence"])', SCORES),
    metrics(
        '"student_logprob": of_sampled(both.log_p, tokens.y)',
        '"student_logprob": of_sampled(both.log_q, tokens.y)',
        PREDICTIONS,
    ),
    metrics('"teacher_logprob": _teacher', '"teacher_logprob": -_teacher', PREDICTIONS),
    metrics('({"reverse_kl": both.reverse_kl}', '({"reverse_kl": both.forward_kl}', PREDICTIONS),
    distributions("columns = torch.cat([columns, rest], dim=1)", "pass", UNIT_METRICS),
    distributions(
        "+ torch.arange(BLOCK, device",
        "+ torch.zeros(BLOCK, dtype=torch.long, device",
        UNIT_METRICS,
    ),
    metrics("(~rollouts.finished)", "rollouts.finished"),
    metrics('"rollout/tokens": lengths', '"rollout/tokens": torch.ones_like(lengths)'),
    # comparing, tile by tile
    tokens("logits = logits / self.temperature", "pass"),
    tokens("self.judge(head.finish(product[some])", "self.judge(product[some]"),
    tokens("slope * tokens.weight[:, None]", "slope / tokens.weight[:, None]"),
    tokens("loss * tokens.weight, slope", "loss * tokens.weight.mean(), slope"),
    tokens("head.slope(product[some], slope, self.temperature)", "product[some] = slope"),
    passes("(1 - torch.tanh(product / self.softcap).square())", "1.0", TILES),
    passes("self.scale / temperature", "1 / temperature", TILES),
    passes("self.scale / temperature", "self.scale * temperature", TILES),
    objective("return both.reverse_kl, (both", "return both.forward_kl, (both", TILES),
    objective("(both.ratio - both.reverse_kl[:, None]).mul_(both.p)", "both.ratio * both.p", TILES),
    objective("both.forward_kl, both.p - both.q", "both.forward_kl, both.q - both.p", TILES),
    objective("(ratio - of_student[:, None])", "ratio.clone()", TILES),
    objective(".mul_(1 - self.beta)", ".mul_(self.beta)", TILES),
    passes(
        "total.addmm_(gradient.T, hidden.float())",
        "total.copy_(gradient.T @ hidden.float())",
        TILES,
    ),
    passes("total[rows] += multiply(", "total[rows] = multiply(", TILES),
    tokens("for_bias += gradient.sum(dim=0)", "for_bias += gradient.mean(dim=0)"),
    tokens("head.by_hidden(gradient, out=for_hidden[rows])", "pass"),
    tokens("gradient.mul_(factor)", "gradient"),
    tokens("                total += loss\n", "                total = loss\n"),
    tokens("min(start + tile, length)", "min(start + tile, length - 1)"),
    tokens("range(0, max(length, 1), tile)", "range(0, length, tile)"),
    tokens('{"opd/loss": loss, **', '{"opd/loss": loss.exp(), **'),
    tokens(
        "tokens, total = self.tokens[rows]",
        "tokens, total = self.tokens[slice(0, rows.stop - rows.start)]",
    ),
    tokens("of_some, tokens[some])", "of_some, tokens[: some.stop - some.start])"),
    tokens("if tensor is not None and needed else None", "if tensor is not None else None"),
    passes(
        "self.softcap * torch.tanh(product / self.softcap)",
        "torch.tanh(product / self.softcap)",
        TILES,
    ),
    passes("product * self.scale", "product", TILES),
    passes("weight[:vocabulary]", "weight[-vocabulary:]", TILES),
    passes("(mask.long().cumsum(dim=1) - 1)", "mask.long().cumsum(dim=1)", "tests/test_models.py"),
    objective(
        "opinions[TEACHER], self.beta)", "opinions[TEACHER], 1 - self.beta)", "tests/objectives"
    ),
    objective(
        "forward_kl(log_p, opinions[TEACHER])",
        "reverse_kl(log_p, opinions[TEACHER])",
        "tests/objectives",
    ),
    objective(
        "return reverse_kl(log_p, opinions[TEACHER])",
        "return forward_kl(log_p, opinions[TEACHER])",
        "tests/objectives",
    ),
    objective(
        "tokens.logmu_y, self.importance_cap) * loss",
        "tokens.logmu_y, 1e9) * loss",
        "tests/objectives",
    ),
    objective(
        "opd_advantage(logp_y, opinions[TEACHER])",
        "-opd_advantage(logp_y, opinions[TEACHER])",
        "tests/objectives",
    ),
    objective("one, other = (log_p, log_q)", "one, other = (log_q, log_p)"),
    objective("slope = ratio - ratio.exp()", "slope = ratio + ratio.exp()"),
    objective("ratio.exp_().mul_(self.alpha - 1)", "ratio.exp_().mul_(self.alpha)"),
    objective("slope -= (both.p * slope)", "slope -= (both.q * slope)"),
    exopd("ratio - (self.scale - 1)", "ratio - self.scale"),
    exopd("(opinions[TEACHER] - opinions[REFERENCE])", "(opinions[TEACHER])"),
    exopd("(cost - loss[:, None])", "cost"),
    exopd("loss = (both.p * cost)", "loss = (both.q * cost)"),
    gradient("scale * (logq_y - logr_y) -", "(logq_y - logr_y) -", EXOPD),
    gradient("(logp_y - logr_y)).detach()", "logp_y).detach()", EXOPD),
    module(
        "self.reference_source = reference or student", "self.reference_source = student", EXOPD
    ),
    module("elif reference is not None:", "elif False:", EXOPD),
    stages("if name == TEACHER}", "}", EXOPD, why="slower, and the same numbers"),
    teachers("if reference and self.reference is not None", "if self.reference is not None", EXOPD),
    teachers("None if compared is None else reader(compared)", "reader(student)", EXOPD),
    step("micro.num_tokens * len(asked[-1].opinions)", "micro.num_tokens", EXOPD),
    weighted(
        "return weight * loss, slope * weight[:, None]", "return loss, slope * weight[:, None]"
    ),
    weighted("return weight * loss, slope * weight[:, None]", "return weight * loss, slope"),
    weighted("return weight * self.objective(", "return self.objective("),
    weighted('dict.fromkeys(full, "full")', "{}"),
    weighted("return self.objective.ratio_of", "return super().ratio_of"),
    weighted("(-entropy).exp()", "entropy.exp()"),
    weighted("torch.exp2(-position / self.half_life)", "(-position / self.half_life).exp()"),
    weighted("(position < self.first)", "(position <= self.first)"),
    weighted("* found.get(WEIGHT, 1.0)", "", WEIGHTED),
    rollouts("self.position[rows]", "self.position[: rows.stop - rows.start]", WEIGHTED),
    horizon("done = min(t - 1, steps)", "done = min(t, steps)"),
    horizon("done = min(t - 1, steps)", "done = t - 1"),
    horizon("math.ceil(math.log2", "math.floor(math.log2"),
    horizon("self.end = self.end or longest", "self.end = longest"),
    measuring("self._last_seconds <= self.share", "0.0 <= self.share"),
    measuring("self._last_seconds <= self.share", "self._last_seconds < self.share"),
    measuring("self._seconds_of_steps += perf_counter() - self._step_began", "pass"),
    measuring("self._own_seconds += self", "self._own_seconds = self"),
    measuring("        self._step_began = perf_counter()\n", "        pass\n"),
    measuring("if trainer.global_step % self.every_n_steps:", "if False:"),
    measuring("if self._measured_step != trainer.global_step:", "if False:"),
    measuring("self._listed_step.bit_length() < ", "0 < "),
    measuring("DRAWING_SHARE * self.share *", "self.share *"),
    measuring("if self._spectra and trainer.is_global_zero:", "if False:"),
    measuring("if geometry.has_matrices(name, shapes[name])]", "]"),
    measuring("min(shapes[name][-2:])", "min(shapes[name])", why="the order of the work alone"),
    measuring("self.weights.shards(self.names),", "self.weights.shards(self.matrices),"),
    measuring(
        "extrapolation.copy_weights(self._before, weights)", "pass", f"{UPDATE} -k before_and"
    ),
    measuring("self._previous = displacement\n", "pass\n"),
    measuring("nanmean()", "mean()"),
    measuring('"cosine_first": self._first}', '"cosine_first": self._previous}'),
    measuring("and not self._resumed:", ":", f"{UPDATE} -k resumed_run"),
    measuring("if row.step <= t]", "]", f"{UPDATE} -k resumed_run"),
    measuring("if row.step < t] + new", "] + new", f"{UPDATE} -k with_a_search"),
    measuring("if not self.overwrite:", "if False:", f"{UPDATE} -k earlier"),
    measuring(
        "if not Accelerator.any_acts_after(trainer):", "if True:", f"{UPDATE} -k with_a_search"
    ),
    measuring(
        "        self._after_step(trainer)\n\n    def on_train_end",
        "        pass\n\n    def on_train_end",
        f"{UPDATE} -k with_a_search",
    ),
    measuring("numbers[j][row] =", "numbers[i][row] =", f"{UPDATE} -k 'ranks and fsdp2'"),
    measuring("(i + 1) % world.size == 0 or i + 1 == count", "i + 1 == count", why="more memory"),
    measuring("i % world.size == world.rank:", "True:", f"{UPDATE} -k 'ranks and fsdp2'"),
    of("opd/weights.py", UPDATE)(
        "return world.sum if self.sharded else lambda sums: sums",
        "return lambda sums: sums",
        f"{UPDATE} -k 'ranks and fsdp2'",
    ),
    of("opd/weights.py", UPDATE)(
        "return world.sum if self.sharded else lambda sums: sums",
        "return world.sum",
        f"{UPDATE} -k 'ranks and ddp'",
    ),
    measuring("key=lambda name: cost[name], reverse=True", "", why="slower"),
    of("callbacks/accelerator.py", f"{UPDATE} -k with_a_search")(
        "if isinstance(c, MovesWeights)]", "if isinstance(c, HoldsWeights)]"
    ),
    of("opd/cli/run_folder.py", f"{UPDATE} -k taken_over")("(metrics|geometry)", "metrics"),
    of("opd/cli/fit.py", f"{UPDATE} -k 'taken_over or resumed_run'")(
        "RunSummary | SampleWriter | UpdateGeometry)", "RunSummary | SampleWriter)"
    ),
    runs("if row.step == rows[-1].step]", "]", MATRICES),
    runs("column.startswith(prefix)", "True", MATRICES),
    report('if name in last else "-"', 'if name in last else "0"', MATRICES),
    report(
        "max(step for step, _ in last.values())", "min(step for step, _ in last.values())", MATRICES
    ),
    geometry_rows("if header != COLUMNS:", "if False:"),
    geometry_rows("enumerate(lines, 2)", "enumerate(lines, 1)"),
    geometry_rows("except (ValueError, TypeError)", "except ValueError"),
    geometry_rows("os.replace(temporary, path)", "path.write_bytes(temporary.read_bytes())"),
    geometry_figures(
        "layers = sorted({layer", "layers = list({layer", why="sets of small integers"
    ),
    geometry_figures("== 1)", "<= len(kinds))"),
    geometry_figures("if norm > middle", "if norm < middle", why="looks"),
    geometry_figures('"marker": MARKERS[i % len(MARKERS)]', '"marker": "o"'),
    geometry("if not matrix.isfinite().all():", "if False:"),
    geometry("reduce_sum(sums).tolist()", "sums.tolist()"),
    geometry("math.sqrt(squares[0]) * math.sqrt(squares[1])", "math.sqrt(squares[0])"),
    step("max_new_tokens=min(limits, default=None)", "max_new_tokens=max(limits, default=None)"),
    step("t, request.max_new_tokens)", "t)", HORIZON),
    stages("None and max_new_tokens < sampler.max_new_tokens:", "None:", HORIZON),
    top_k("torch.where(inside, log_p - log_q, tail_p - tail_q)", "(log_p - log_q) * inside"),
    top_k("lowest = torch.finfo(log_p.dtype).min", "lowest = 0.0"),
    top_k("ratio.sub_(loss[:, None])", "ratio"),
    top_k("both.p - (both.log_p - ratio).exp_()", "both.p - both.q"),
    top_k("(mass * inside)", "(mass * ~inside)"),
    top_k("return (log_p.exp() * ratio)", "return -(log_p.exp() * ratio)"),
    distributions("ours.logical_or_(theirs)", "ours.logical_xor_(theirs)", "tests/objectives"),
    tokens("**self.objective.measure(both, tokens)", "", "tests/objectives/test_top_k.py"),
    gradient("(logq_y - logp_y).detach()", "(logq_y - logp_y)", "tests/objectives"),
    gradient("logp_old_y).clamp(-20, 20)", "logp_old_y).clamp(-2, 2)", "tests/objectives"),
    gradient("dual_clip * advantage)", "advantage)", "tests/objectives"),
    gradient("torch.where(advantage < 0", "torch.where(advantage > 0", "tests/objectives"),
    # a step
    step(
        'derive_seed(module.seed, t, "rollout")',
        'derive_seed(module.seed, "rollout")',
    ),
    step("copies, seed = module.rollouts_per_prompt,", "copies, seed = 1,", COMPLETIONS),
    step(
        'module.ledger.count("rollout_tokens", len(rollouts.keep_sampled(rollouts.tokens)))',
        'module.ledger.count("rollout_tokens", len(rollouts))',
        COUNTS,
    ),
    step(
        'module.ledger.count("train_tokens", counts[i])\n            stages.',
        "stages.",
        COUNTS,
    ),
    step('module.ledger.count("teacher_tokens", count)', "pass", COUNTS),
    scores('module.ledger.count("teacher_tokens", micro.num_tokens)', "pass", SCORES),
    step(
        'own_randomness(module.device, module.seed, t, world.rank, "dropout")',
        "torch.enable_grad()",
        DROPOUT,
    ),
    step(
        'own_randomness(module.device, module.seed, t, world.rank, "dropout")',
        'own_randomness(module.device, 0, t, world.rank, "dropout")',
        DROPOUT,
    ),
    step("(world.size / total)", "(1 / len(micro_batches))"),
    step(
        "world.sum(torch.tensor(float(sum(counts)))).item()",
        "sum(counts)",
        "tests/test_distributed.py::test_two_processes_draw_the_same_rollouts_and_end_at_the_same_weights[ddp]",
    ),
    step(
        "sharding.clip_gradients(student, max_grad_norm)", "sharding.clip_gradients(student, 1e9)"
    ),
    step("        scheduler.step()\n", "        pass\n"),
    step("        scheduler.step()\n", "        pass\n", WEIGHTS),
    step("    optimizer.zero_grad()\n    weights", "    weights", WEIGHTS),
    step('"optim/lr": learning_rate', '"optim/lr": optimizer.param_groups[0]["lr"]'),
    step('"optim/grad_norm": grad_norm', '"optim/grad_norm": min(grad_norm, max_grad_norm)'),
    step("else squares).sqrt())", "else squares))"),
    step("    weights.changed()\n", ""),
    step("if not math.isfinite(grad_norm):", "if math.isnan(grad_norm):"),
    step("held_out=max(", "held_out=min("),
    step("keep_opinions=any(", "keep_opinions=all("),
    step("rollouts.columns[LOT] < held_out", "rollouts.columns[LOT] <= held_out"),
    step("[reading] if keep_opinions", "[reading] if not keep_opinions"),
    step("if share else", "if not share else"),
    step("stages.micro_batches(module, held_out)", "stages.micro_batches(module, trained)"),
    step(
        "(local // copies * world.size + world.rank) * copies",
        "(local // copies + world.rank) * copies",
    ),
    step("[position] / (total - 1)", "[position] / total"),
    step("(~v.isfinite()).sum()", "v.isnan().sum() * 0"),
    stages("derive_seed(seed, p.row, i)", "derive_seed(seed, p.row)", COMPLETIONS),
    stages("derive_seed(seed, p.row, i)", "derive_seed(seed, i)"),
    stages("temperature=temperature)", "temperature=1.0)", SEARCHES),
    records(
        "verifier.verify(completions, references)",
        "verifier.verify(completions, references[::-1])",
        ACCURACY,
    ),
    records("in enumerate(answers) if answer is not None]", "in enumerate(answers)]", ACCURACY),
    verifiers("setup=IMPORTS", 'setup=""'),
    verifiers("if len(reasons) == len(references):", "if False:"),
    verifiers("seconds=self.seconds", "seconds=10.0"),
    verifiers("if not allow_code_execution:", "if False:"),
    apps("if all(isinstance(part, str) for pair in pairs for part in pair):", "if False:"),
    apps("with contextlib.suppress(ValueError):", "if True:"),
    teachers("self[self.name_of(micro.prompts.prompts[0])]", "next(iter(self.values()))", STEP),
    teacher("/ teacher.temperature", "/ 1.0", TILES),
    teacher("[parts[i] for i in completions]", "parts[: len(completions)]", TILES),
    module("        model.train(trained)\n", "", DROPOUT),
    module("self.evaluation_metrics.reset()", "pass", VALIDATION),
    # scores
    scores("return Score(right.mean(dim=1)", "return Score(1 - right.mean(dim=1)"),
    stages("values.append(-micro.spread(", "values.append(micro.spread(", SCORES),
    stages(
        "weights.append(micro.counts[filled].float().cpu())",
        "weights.append(torch.ones(int(filled.sum())))",
        SCORES,
    ),
    stages('module.ledger.count("search_tokens", micro.num_tokens)', "pass", SCORES),
    scores("columns[LOT] >= 1 - fraction", "columns[LOT] >= 0", SCORES),
    scores("held_out=self.fraction if", "held_out=0.0 if", SCORES),
    scores('self.rollouts in ("step", "part")', 'self.rollouts in ("step",)', SCORES),
    scores("copies=self.samples, temperature=self.temperature", "copies=self.samples", SEARCHES),
    # weights and accelerators
    weights(
        "tensor.to(weight.device, copy=True)", "tensor.to(weight.device)", "tests/test_weights.py"
    ),
    weights(
        'if device == "parameters" else to_host(tensor)',
        'if device == "cpu" else to_host(tensor)',
        EFFOPD,
    ),
    weights(
        "for name in (parameters if names is None else names)",
        "for name in parameters",
        "tests/test_weights.py",
    ),
    accelerator(
        'ledger.totals["search_tokens"] - tokens_before', 'ledger.totals["search_tokens"]', SEARCHES
    ),
    accelerator(
        "if not self.due(trainer.global_step):", "if not self.due(trainer.global_step + 1):", EFFOPD
    ),
    accelerator(
        'ledger.phase("search"),',
        'ledger.phase("train"),',
        f"{NUMBERS}::test_seconds_add_up",
    ),
    accelerator("if len(names) > 1:", "if len(names) > 2:", EFFOPD),
    accelerator(
        "if trainer.ckpt_path is not None and not self._resumed:",
        "if trainer.ckpt_path is not None:",
        EFFOPD,
    ),
    logs(
        "step=trainer.global_step",
        "step=trainer.global_step - 1",
        f"{NUMBERS}::test_effopd_logs_only_when_it_searches",
    ),
    effopd("        move_to(result.coefficient)\n", "", EFFOPD),
    effopd(
        "self.score.request() if self.due(t)", "self.score.request() if self.due(t + 1)", SEARCHES
    ),
    effopd('"score_before": result.score_before', '"score_before": result.score_after'),
    effopd(
        "self.weights.copy(self.names, self.anchor_device)",
        'self.weights.copy(self.names, "parameters")',
        EFFOPD,
    ),
    accelerator("weight, self.anchor_device)", 'weight, "parameters")', EFFOPD),
    # draws
    randomness("(positions + 1)", "positions", RANDOM),
    randomness("_shift_right(bits, 11)", "_shift_right(bits, 12)", RANDOM),
    randomness("((1 << (64 - bits)) - 1)", "-1", RANDOM),
    sampling("right=True", "right=False"),
    sampling("wanted = numbers * total", "wanted = numbers"),
    sampling("(wanted - before).clamp(min=0)", "wanted"),
    sampling("block * BLOCK + token", "token"),
    decoding("numbers[rows, position % NUMBERS]", "numbers[rows, 0]"),
    decoding("coming = torch.arange(position, position + NUMBERS", "coming = torch.arange(NUMBERS"),
    decoding("len(left) <= SHARE * len(rows) and batch.can_select", "False"),
    decoding("rows, tokens, ended = rows[left], tokens[left], ended[left]", "rows = rows[left]"),
    decoding("return logits[prompt_of]", "return logits[torch.zeros_like(prompt_of)]"),
    decoding("value.batch_select_indices(rows)", "pass"),
    decoding("self.kwargs[name] = value.index_select(along, rows)", "pass"),
    engine("sampler, seeds[cut]", "sampler, seeds[: cut.stop - cut.start]", ROLLOUTS),
    rollouts("column[index, :width]", "column[:, :width]", "tests/rollouts"),
    rollouts(
        "column[:, None].expand_as(mask)", "column[:, None].expand_as(mask) * 0", "tests/rollouts"
    ),
    micro("width * len(group) <= max_tokens", "width <= max_tokens", "tests/rollouts"),
    micro(
        "missing = count - len(micro_batches)",
        "missing = 0",
        "tests/test_distributed.py::test_unequal_completions_and_a_rank_without_prompts_do_not_deadlock[fsdp2-held_out]",
    ),
    accelerator("            trainer.precision_plugin.train_step_context(),\n", "", EFFOPD),
    effopd("            move_to(0.0)\n", "", EFFOPD),
    effopd("if coefficient > -1 / steps else", "if coefficient > -1 else", GAINS),
    effopd("if coefficient > -1 / steps else", "if coefficient > 0 else", GAINS),
    extrapolation("compare(best.proximal(weight), ", "compare(best, ", GAINS),
    extrapolation("score.proximal(weight)", "score", GAINS),
    effopd("if not self._resumed:", "if True:", GAINS),
    effopd(
        "self._anchor_step = trainer.global_step\n        self.schedule", "self.schedule", CARRIES
    ),
    effopd(".learning_rate_factor(steps)", ".learning_rate_factor(1)", CARRIES),
    extrapolation("1 + self.coefficient / steps", "1 + self.coefficient"),
    extrapolation("self.values - weight * self.moved", "self.values - self.moved", SCORES),
    effopd("self.learning_rate_factor *= ", "self.learning_rate_factor = ", CARRIES),
    effopd("result.coefficient == -1 and not", "result.coefficient != 0 and not", CARRIES),
    effopd("learning_rate_factor=self.learning_rate_factor)", "learning_rate_factor=1.0)", CARRIES),
    effopd("            self.score.release()\n", "            pass\n", EFFOPD),
    scores("        self._readings = []\n", "        pass\n", SCORES),
    sampling("found = found.clamp(max=weights.shape[1] - 1)", "pass"),
    sampling("masked_fill(columns >= size, 0.0)", "clone()"),
    sampling(".clamp(max=1 - 2**-53)", "", why="by rounding alone is it ever 1"),
    teacher("self.model.tie_weights()", "pass", STEP),
    of("opd/models/checks.py", "tests/test_models.py")('("16-mixed", "16-true")', '("16-true",)'),
    weights(
        "        finally:\n            self.changed()\n",
        "        finally:\n            pass\n",
        EFFOPD,
    ),
    # models: what they are, what ends them, where they come from
    gguf('if token["id"] < entries', "if token"),
    gguf(" or _first_bytes(path) == MAGIC", ""),
    gguf("state.st_size, state.st_mtime_ns", "0, 0"),
    gguf("@functools.lru_cache(maxsize=1)\n", ""),
    gguf("    plain.load_state_dict(model.state_dict(), assign=True)\n", ""),
    gguf("    plain.tie_weights()\n", ""),
    loading("if missing or unexpected:", "if missing:"),
    loading("if missing or unexpected:", "if unexpected:"),
    loading("if _has_one_matrix(as_configured):", "if False:"),
    loading("    if mismatched:", "    if False:"),
    loading(" if not key.endswith(FORMER_BUFFERS)", ""),
    loading("config.is_encoder_decoder or not", "not"),
    loading('("output_router_logits", False)', '("output_router_logits", True)'),
    loading("chosen = wanted or stored", "chosen = wanted"),
    loading("for path in _own_code(model) if adapter is None else ():", "for path in []:"),
    loading('if attention not in (None, "sdpa"):', "if False:"),
    loading("model.generation_config = saveable(", "_ = (", "tests/test_models.py"),
    generation("own.union(*teachers.values()) if given is None", "own if given is None"),
    generation("tuple(sorted(found & tokens))", "tuple(sorted(found))"),
    generation("list(ids).count(token_id) > 1", "False"),
    generation("top_k=0, top_p=1.0", "top_p=1.0", HARNESS),
    engine_lm("with generating_with(self.model, ends):", "if True:", "tests/test_families.py"),
    of("opd/module.py", PAIR)("if ends != own_ends:", "if False:"),
    of("opd/module.py", PAIR)(", vocabulary=self.teachers.vocabulary\n", "\n"),
    of("opd/teachers/teachers.py", PAIR)(
        "        vocabulary,\n        ends,\n",
        "        vocabulary,\n        None,\n",
    ),
    sampling("logits[:, : sampler.vocabulary]", "logits"),
    of("opd/models/passes.py", "tests/test_loading.py")("if inner is model:", "if False:"),
    checks("(differ(own[0, :2], own[1, :2]),", "(False,"),
    checks("(differ(ours[2], own[0, :2]),", "(False,"),
    checks('model.config._attn_implementation = "eager"', "pass"),
    checkpoint("if beyond := sorted(ours - wanted.keys()):", "if beyond := []:"),
    checkpoint("if found[name] != tuple(tensor.shape):", "if False:"),
    of("opd/strategies.py", "tests/test_loading.py")(
        "if beyond := sorted(students - wanted.keys()):", "if beyond := []:"
    ),
    hub("timeout=PATIENCE", "timeout=None"),
    hub("revision=revision or None,\n", ""),
    of("opd/cli/export.py", "tests/test_cli.py::test_export_is_all_or_nothing")(
        "if is_new and", "if False and"
    ),
    # what a run is told: resumed, refused, explained
    optimization("        group.update(options)\n", "        pass\n"),
    optimization("scheduler.load_state_dict(at_step.state_dict())", "pass"),
    optimization('if saved["optimizer"] != ours["optimizer"]:', "if False:"),
    optimization("while scheduler is not None and taken < steps:", "while False:"),
    module("            optimization.apply(\n", "            (lambda *_: None)(\n", OPTIONS),
    module('checkpoint["optimization"] = self._options', "pass", OPTIONS),
    module("checkpoints.find_misfit(wanted, state)", "None", OPTIONS),
    module("compatibility.check_trainer(self.trainer)", "pass", BAD_INPUT),
    module("check_monitors(self.trainer, [*results, *self._logged])", "LOGGED", BAD_INPUT),
    module("check_monitors(self.trainer, self._logged)", "LOGGED", BAD_INPUT),
    compatibility("    lightning.BatchSizeFinder: NO_BATCH,\n", ""),
    compatibility("if trainer.gradient_clip_val:", "if False:"),
    compatibility("if getattr(trainer, name) == 0:", "if False:"),
    explain("reason = rest\n", "reason = line\n"),
    explain("GIVEN.search(reason) or GIVEN.search(text)", "GIVEN.search(reason)"),
    recipes("if key.value in lines:", "if False:"),
    recipes("if not isinstance(node, yaml.MappingNode):", "if False:"),
    recipes("if node is None:", "if False:"),
    loading("        model.tie_weights()  # which", "        pass  # which"),
    loading("if len(tokenizer) == len(tokenizer.get_added_vocab()):", "if False:", BAD_INPUT),
    checks("if not own.isfinite().all():", "if False:"),
    effopd(
        "len(result.tried) > 1 and len(set(scores)) == 1",
        "True",
        "tests/callbacks/test_effopd.py::test_a_search_that_cannot_tell_weights_apart_says_so_once",
    ),
    summary("if not self.overwrite:", "if False:"),
    of("callbacks/samples.py", FILES)("refuse_to_replace(trainer, FILES)", "pass"),
    held_out("if trainer.sanity_checking:", "if True:", f"{HELD}::{CUT_SHORT}"),
    held_out("pl_module.world.gather(mine)", "[mine]", DEALT_HELD_OUT),
    held_out('sorted(records, key=lambda record: record["row"])', "records", DEALT_HELD_OUT),
    held_out("itertools.zip_longest(*by_set.values())", "by_set.values()"),
    evaluation("rollouts.columns[RIGHT].masked_fill_(~rollouts.finished, math.nan)", "pass"),
    records("column[answered] = right", "column[: len(right)] = right", HELD),
    evaluation("derive_seed(seed, prompt.row, 0)", "derive_seed(seed, prompt.row, 1)"),
    evaluation("if prompt.row in rows]", "]"),
    evaluation("if not memory.is_out_of_memory(error):", "if True:"),
    of("opd/teachers/local.py", f"{HELD}::test_two_processes_write_the_prompts_that_one_writes")(
        "self.offload or is_sharded(self.model)", "self.offload"
    ),
    texts("start, told = told, i", "start, told = i, i"),
    texts("i - told < UTF8_BYTES and", ""),
    texts(" and i < len(token_ids)", ""),
    of(
        "opd/cli/run_folder.py",
        f"{FOLDER}::test_overwrite_replaces_the_run_and_keeps_what_is_beside_it",
    )('"validation": re.compile(', '"other": re.compile('),
    rollouts_page("kl >= bound", "kl > bound"),
    rollouts_page("PROMPTS_OF_ALL // len(found)", "PROMPTS_OF_ALL"),
    rollouts_page("html.escape(text.translate(UNSEEN))", "text.translate(UNSEEN)"),
    rollouts_page("html.escape(text.translate(UNSEEN))", "html.escape(text)"),
    rollouts_page('title="{_escape(title)}"', 'title="{title}"'),
    rollouts_page("{n: v[i] for", "{n: v[0] for"),
    rollouts_page("range(count - TAIL, count)", "range(HEAD, HEAD + TAIL)"),
    rollouts_page("id=find type=search", "id=search type=search"),
    held_out_rows("if step <= last_step), default", "), default"),
    held_out_rows(
        'records[int(record["row"]), record["prompt"]]', 'records[int(record["row"]), ""]'
    ),
    held_out_rows("len(record[name]) != len(tokens)", "False"),
    of("callbacks/earlier_run.py", FILES)("and trainer.ckpt_path is None", ""),
    of("opd/cli/fit.py", "tests/test_resume.py::test_a_resumed_run_says_which_options_are_others")(
        "if names and ranks.name() is None:", "if False:"
    ),
    of("opd/cli/fit.py", LIGHTNING)("[int, *(m for m in members if m is not int)]", "members"),
    of("opd/cli/fit.py", LIGHTNING)("[*events, MetricsCSV(self.folder)]", "events"),
    of("opd/cli/run_folder.py", AT_ONCE)(
        "fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"
    ),
    of("opd/memory.py", MEMORY)("if not is_out_of_memory(error):", "if True:"),
    of("opd/memory.py", MEMORY)("raise OutOfMemoryError(", "raise UserError("),
    saving("or alone:", "and alone:", MEMORY),
    saving("loader.put_back()", "pass", MEMORY),
    saving("place in Path(previous).absolute().parents", "False"),
    saving("state = moved if is_here else state_dict", "state = state_dict"),
    saving("        return type(self).__name__\n", "        return super().state_key\n"),
    saving(
        "if self.save_end:",
        "if True:",
        f"{FOLDER}::test_a_run_that_is_not_to_save_its_end_does_not",
    ),
    saving("if trainer.fast_dev_run:", "if False:", LIGHTNING),
    sandbox('"PYTHONHASHSEED": "0",', ""),
    sandbox("if too_much:\n", "if False:\n"),
    sandbox("if not started:", "if False:"),
    launcher("prctl(PR_SET_NO_NEW_PRIVS, 1)", "pass"),
    launcher("resource.setrlimit(number, (value, value))", "pass"),
    launcher('"setsid": (112, 157),', ""),
    launcher('"socket": (41, 198),', ""),
    launcher('"utimensat": (280, 88),', "", why="as root, programs are another user"),
    launcher('"truncate": (76, 45),', "", why="so says Landlock, where it is new enough"),
    launcher("when(PRLIMIT, 0, (equal, 1, 0, 0))", "pass", why="as root, they are another user"),
    launcher("when(SOCKETPAIR, 1,", "(lambda *_: None)(SOCKETPAIR, 1,"),
    launcher("os.killpg(pid, SIGKILL)", "pass"),
    launcher("poll.register(control, select.POLLIN)", "pass", SANDBOX),
    calls("isinstance(value, type) and value in TYPES", "False"),
    calls("if not self.trusting and what not in OF_THE_TESTS:", "if False:"),
    calls("if not (hasattr(builtins, name) or name in vars(module)):", "if True:"),
    calls("if peer.lost is not None:", "if False:"),
    calls("isinstance(kind, type) and issubclass(kind, Exception)", "isinstance(kind, type)"),
    calls("reply.decode_content(value, tree)", "pass"),
    calls("new if new != old else None", "None"),
    calls('type(actual).__name__ != "ndarray" and', ""),
    calls("len(actual) == len(expected)\n", "True\n"),
    code("return code if opened is None else None", "return code"),
    code("code = textwrap.dedent(code)", "pass"),
    code('outcome.stdout.strip() == "1"', 'outcome.stdout.startswith("1")'),
    code('if outcome.status != "ok":', "if False:"),
    code("if wanted.lstrip", "if False and wanted.lstrip"),
    code("len(words) == len(wanted) and", ""),
    # controls
    gradient("(logp_y.detach().exp() < below)", "(logp_y.detach().exp() > below)"),
    lookahead("s.lerp_(f.to(s.device), self.alpha)", "s.lerp_(f.to(s.device), 1 - self.alpha)"),
    lookahead("f.copy_(s)", "pass"),
    accelerator('if kind == "anchor" else', "if True else", ACCELERATORS),
    accelerator(
        'f"{self.label}_{kind}.{key}" for',
        'f"{kind}.{key}" for',
        why="all ranks have the same there",
    ),
    snoo("copy_weights(slow, fast)", "pass"),
    snoo("return t % self.k == 0", "return t % self.k == 1"),
    snoo("b.mul_(momentum).add_(s)", "b.mul_(momentum).sub_(s)"),
    snoo("s.add_(b, alpha=momentum)", "b"),
    snoo("alpha=learning_rate", "alpha=1"),
    snoo("not 0 <= momentum < 1", "False"),
    snoo(
        "self.weights.over_shards(World(trainer.strategy))",
        "lambda sums: sums",
        f"{ON_TWO}[fsdp2-snoo]",
    ),
    two_point("(self.target - self.second) /", "(self.target - self.first) /"),
    two_point("-coefficient)", "coefficient)"),
    two_point("if trainer.global_step == self.first:", "if False:"),
    two_point("trainer.global_step > self.first and", "trainer.global_step > self.second and"),
    two_point("seen = self._resumed and", "seen ="),
    two_point(
        "self.weights.over_shards(World(trainer.strategy))",
        "lambda sums: sums",
        f"{ON_TWO}[fsdp2-two_point]",
    ),
    relex("d.copy_(w.to(a.device) - a)", "d.copy_(w)", ACCELERATORS),
    relex("if not seen:", "if False:"),
    relex("if target <= at:", "if target < at:"),
    relex("[*self.observed, self.at]", "list(range(seen + 1))"),
    relex("self.weights.over_shards(world)", "lambda sums: sums", f"{ON_TWO}[fsdp2-relex]"),
    alphaopd("len(shapes[name]) == 2", "True"),
    alphaopd('entry["score"] for entry', "0.0 for entry"),
    alphaopd("yield w\n", "yield w * 0\n"),
    alphaopd("self.score.release()", "pass"),
    alphaopd('| {"points": self._points}', '| {"points": {}}'),
    alphaopd("if not any(", "if any("),
    alphaopd("rank_one[start :", "rank_one[0 :", f"{ON_TWO}[fsdp2-alphaopd]"),
    alphaopd("self.weights.over_shards(world)", "lambda sums: sums", f"{ON_TWO}[fsdp2-alphaopd]"),
    once("return t in self.steps", "return t + 1 in self.steps"),
    once("if self.observed != expected:", "if False:"),
    once("if t >= self.steps[-1] and not", "if t > self.steps[-1] and not"),
    once("self.observed[0] <= s <= t", "s <= t", RELEX_LATE),
    once("self.let_go(t)", "pass"),
    once("0 <= trainer.max_steps < self", "0 <= trainer.max_steps <= self"),
    once("if t < self.steps[-1] and", "if t <= self.steps[-1] and"),
    once("and not self._is_too_short(trainer)", ""),
    two_point("or self.first in self.observed", "or True"),
    of("callbacks/alphaopd.py", f"{BAD_INPUT} -k AlphaOPD")("and target > 0", "and target > 1"),
    of("callbacks/alphaopd.py", f"{BAD_INPUT} -k AlphaOPD")("self.score.check(pl_module)", "pass"),
    once("at < 2 * every or", ""),
    once("or at % every", ""),
    linear("(move * direction).sum(), direction", "(move * move).sum(), direction"),
    linear("if squares else 0.0", ""),
    linear("= reduce_sum(sums)", "= sums"),
    linear("weights_change=True", "weights_change=False"),
    linear("            w.copy_(target)\n", ""),
    linear("range(0, rows[0].numel(), AT_A_TIME)", "range(0, AT_A_TIME, AT_A_TIME)"),
    linear("vectors[..., -1]", "vectors[..., 0]"),
    linear("target - t.mean()", "target"),
    linear("1 / len(t) +", ""),
    linear("if total else 0.0", ""),
    linear("copy=True)", "copy=False)"),
    linear("displacement.double().norm() * leading", "leading"),
    linear("< 0:\n        return -x, -v_1", "< 0:\n        return -x, v_1"),
    linear("torch.dot(x, aligned_with) < 0", "torch.dot(x, aligned_with) > 0"),
    linear("x - mean, y - middle", "x, y - middle"),
    linear("(target - middle)", "target"),
    linear("if not length > 0:", "if False:"),
    linear("y @ t / length", "y @ t"),
    averaging("self.averaged > 1", "True"),
    averaging("share = 1 - self.decay", "share = self.decay"),
    averaging("with exchanged(self._module, self.anchor):", "if True:"),
    averaging('return {"averaged": self.averaged}', 'return {"averaged": 0}'),
    directions("(wanted / found)", "(found / wanted)"),
    directions("+ (start + begin)", "+ begin"),
    directions("reduce_sum(torch.stack(", "(torch.stack("),
    weights("sizes)[: world.rank]", "sizes)[: world.rank + 1]", RANDOM_OF_TWO),
    effopd("base, origin, coefficient", "base, anchor, coefficient", ON_A_LINE),
    randomness("2 * positions + 1", "2 * positions", NORMAL),
    optimization("optimizer.eval()", "pass", SCHEDULE_FREE),
    optimization("optimizer.train()", "pass", SCHEDULE_FREE),
    optimization("if name in known}", "}", KEEPS_RATE),
    scores("data.validation_prompts, f", "data.train_prompts, f", ORACLE),
    # reuse of rollouts
    reuse("CAP = 5.0", "CAP = 50.0", REUSE_WEIGHTS),
    reuse("ratio[:, :-1]", "ratio[:, 1:]", REUSE_WEIGHTS),
    reuse("torch.ones_like(ratio[:, :1])", "torch.zeros_like(ratio[:, :1])", REUSE_WEIGHTS),
    reuse("return ratio * rollouts.mask", "return ratio", REUSE_WEIGHTS),
    reuse("best = after", "pass"),
    reuse("-reuse.margin * change", "reuse.margin * change"),
    reuse("if not change.difference >= -reuse", "if change.difference < -reuse"),
    reuse("change.difference >= -reuse", "change.difference > -reuse"),
    reuse("range(2, reuse.steps + 1)", "range(2, reuse.steps + 2)"),
    reuse("Reused(reuse.steps, undone=False)", "Reused(reuse.steps, undone=True)"),
    reuse("saved.restore()", "pass", REUSE_UNDONE),
    reuse("copy_weights(shards, self._copies)", "pass", REUSE_UNDONE),
    reuse("self._optimizer.state.update(self._state)", "pass", REUSE_UNDONE),
    reuse("value.detach().clone()", "value.detach()", REUSE_UNDONE),
    reuse("del group[name]", "pass", REUSE_KEPT),
    reuse("group.update(saved)", "pass", REUSE_KEPT),
    reuse("name: _copy(part) for", "name: part for", REUSE_KEPT),
    reuse("except NonFiniteError:", "except KeyError:", REUSE_NAN),
    reuse("score() if reuse.held_out else None", "score()", REUSE_ALL),
    reuse("self.steps >= 1", "self.steps >= 0", REUSE_REFUSED),
    reuse("0 <= self.held_out < 1", "0 <= self.held_out <= 1", REUSE_REFUSED),
    reuse("0 <= self.margin", "-9 <= self.margin", REUSE_REFUSED),
    objective('"previous" if "full" in', '"sampled" if "full" in', REUSE_STEPS),
    objective('"sampled" if self.importance_cap is None else None', '"sampled"', REUSE_STEPS),
    objective('"sampled" if self.importance_cap is None else None', "None", REUSE_STEPS),
    stages('"weight": importance_weights(', '"wait": importance_weights(', REUSE_STEPS),
    stages(
        "with in_eval_mode(module.student):\n        logp_y", "if 1:\n        logp_y", REUSE_DROPOUT
    ),
    passes("    model.eval()\n", "", REUSE_DROPOUT),
    passes("model.train(training)", "model.train(False)", REUSE_DROPOUT),
    step("share = max(share, reuse.held_out)", "share = reuse.held_out", REUSE_SHARED),
    step("readings=readings if request.keep_opinions else []", "readings=readings", REUSE_SHARED),
    step("sum(m.num_tokens for m in aside)", "0", REUSE_SHARED),
    step('module.ledger.count("train_tokens", counts[i])\n        values', "values", REUSE_SHARED),
    step("weighed = stages.weighed(module, reading)\n", "weighed = reading\n", REUSE_STEPS),
    step("functools.partial(world.step, optimizer)", "optimizer.step", REUSE_RUN),
    step('"dropout", k)', '"dropout")', REUSE_DROPOUT),
    step("            optimizer.zero_grad()\n            raise", "            raise", REUSE_NAN),
    step("total / count for name,", "total for name,", REUSE_STEPS),
    step("        if scheduler is not None:\n", "        if again is not None:\n", REUSE_OUT),
    of("opd/world.py", REUSE_RUN)("self._strategy.optimizer_step(own, lambda: None)", "pass"),
    module(
        "if reuse is not None and reuse.steps > 1 else None",
        "",
        f"{REUSE}::test_one_step_is_ordinary_opd",
    ),
    scores("read or [_read", "[_read", REUSE_SHARED),
    # adapters, the alarm, and what the teacher alone reads
    adapters("torch.manual_seed(self.seed)", "pass"),
    adapters("with torch.random.fork_rng(devices=[]), ", "with "),
    adapters("parameter.data = parameter.data.float()", "pass"),
    adapters("inference_mode=True", "inference_mode=False", why="peft's own reading overrides it"),
    adapters('if theirs["lora_alpha"] != wanted["lora_alpha"]:', "if False:"),
    adapters("if before != now and rank() == 0:", "if rank() == 0:"),
    adapters("if CONFIG not in saved:", "if False:"),
    adapters("weight = weight + adapted.get_delta_weight(NAME)", "pass", "tests/test_tokens.py"),
    adapters(" and not adapted.disable_adapters", "", "tests/test_tokens.py"),
    adapters("weight = _dequantized(quantized[name])", "pass"),
    adapters("if different := sorted(wanted ^ held):", "if different := sorted(wanted - held):"),
    adapters("model.enable_adapters()", "pass", BASE_TEACHER),
    loading(
        "if weights:\n                model = adapters.merged",
        "if False:\n                model = adapters.merged",
        ADAPTERS,
    ),
    loading("adapter.attach(model, source)", "pass", ADAPTERS),
    loading('not any(Path(folder).glob("tokenizer*"))', "False", ADAPTERS),
    loading("elif more:", "elif False:", ADAPTERS),
    module("checkpoint[checkpoints.STATE_DICT] = self._trained(", "_ = (", ADAPTERS),
    module("is_base and as_it_is", "as_it_is", ADAPTERS),
    alarm("gap > 10 * self._first", "gap > 0.1 * self._first"),
    alarm("if gap > ROUNDING:", "if False:"),
    alarm("self._warned = True", "pass"),
    alarm("or self._warned)", ")"),
    alarm("stop is not None and gap > stop:", "False:"),
    alarm("sampler.top_p < 1 or sampler.top_k > 0", "False"),
    alarm("if self._first is None:", "if True:"),
    server("self._ahead = begun", "pass"),
    server("wait([self._ahead.answers])", "pass"),
    server("(begun.sampler, begun.seeds) == (sampler, tuple(seeds))", "True"),
    server("if self._pushed == self._weights.version:", "if self._pushed is not None:"),
    server("if self._pushed == self._weights.version:", "if False:"),
    server("if not self.staleness:", "if False:"),
    server('server.post("/reset_prefix_cache", {})', "pass", why="vLLM alone has such a cache"),
    server("if longest + sampler.max_new_tokens > limit:", "if longest > limit:"),
    server('not in ("stop", "length")', "is None"),
    server("if own != theirs:", "if False:"),
    servers("retries=False", "retries=3", why="tried as often in the end"),
    servers("if waited >= seconds:", "if waited >= 10 * seconds:"),
    servers('f"HTTP {answer.status}"', "None"),
    servers("raise LostServer(str(error)) from error", "raise"),
    stream(
        "if hmac.compare_digest(bytes(_read(connection, KEY_BYTES)), key.encode()):", "if True:"
    ),
    stream("or any(one.done() for one in asked)", ""),
    step(
        "stages.weighed(module, reading) if module.engine.staleness else reading", "reading", BEHIND
    ),
    step('derive_seed(module.seed, t + 1, "rollout")', "seed", AHEAD),
    step("if not module.engine.staleness:", "if True:", AHEAD),
    conversations("derive_seed(one.seed, turn) if turn else one.seed", "one.seed"),
    conversations("[logprobs is None]", "[False]"),
    conversations("one.finished = False\n", "pass\n"),
    conversations("if one.finished]", "]"),
    conversations(".removeprefix(str(self._tokenizer.decode([end])))", ""),
    conversations("if not whole.startswith(known):", "if False:"),
    conversations('if reply["content"] not in said', "if False"),
    conversations(" + self.turn_tokens > sampler", " > sampler"),
    rollouts("self.present & (inserted == 0)", "self.present", CONVERSATIONS),
    rollouts(
        "self.mask.sum(dim=1) if INSERTED in self.columns else self.lengths",
        "self.lengths",
        CONVERSATIONS,
    ),
    rollouts("[self.prompts.mask, self.present]", "[self.prompts.mask, self.mask]", CONVERSATIONS),
    metrics(
        "rollouts.counts.double()",
        "rollouts.lengths.double()",
        "tests/rollouts/test_conversations.py",
    ),
    stages("micro.counts[filled]", "micro.lengths[filled]", "tests/rollouts/test_conversations.py"),
    served("*ids[: length - 1]", "*ids[:length]", why="one token more is read, for nothing"),
    served("len(prompt.token_ids) - 1", "len(prompt.token_ids)"),
    served("            if length:", "            if True:", why="a prompt is read for nothing"),
    served("if lengths != [", "if False and lengths != ["),
    served("or_lost(self.hidden.result)", "self.hidden.result()"),
    served("if self.rows is not None:", "if False:"),
    served(
        "completions if self.rows is None else [self.rows[i] for i in completions]", "completions"
    ),
    loading(
        'if any(name == key or name.endswith(f".{key}") for name in names):',
        "if key in names:",
        SERVED,
    ),
    teachers("teacher.read(micro.for_teacher())", "teacher.read(micro)", KNOWS_MORE),
    teachers("self.reference.read(micro)", "self.reference.read(micro.for_teacher())", KNOWS_MORE),
    prompt_format("if PROMPT in before:", "if False:"),
    prompt_format("before=before + context", "before=before"),
    prompt_format("contexts.append(context or None)", "contexts.append(context)"),
    # what learns nothing from its teacher
    probe("if largest <= ROUNDING:", "if largest < 0:"),
    probe("if asks and _vanishes(", "if False and _vanishes("),
    probe("p = case.tokens.logmu_y.exp()[:, None]", "p = 1.0"),
    probe("asks = TEACHER in objective.needs", "asks = True"),
    probe("if asks and _same(", "if False and _same("),
    probe("if rewarded and _same(", "if False and _same("),
    probe("weight.first >= max_new_tokens", "weight.first > max_new_tokens"),
    probe("and weight.half_life is None", "and True"),
    probe("objective = objective.objective\n", "return\n"),
    probe("logits[who] = logits[other]", "pass"),
    probe("position[0], position[-1] = 0, longest - 1", "pass"),
    probe('other = _slope(objective, case, "other")', "other = _slope(objective, case)"),
    module('self._check_objective({"student": TEACHER})', "pass", f"{PROBE} -k before_it"),
    module("if self.reference_source in teachers:", "if False:", f"{PROBE} -k before_it"),
    module("if stage == TrainerFn.FITTING:", "if False:", f"{PROBE} -k before_it"),
    module("if stage == TrainerFn.FITTING:", "if True:", f"{PROBE} -k before_it"),
    module("TEACHER, REFERENCE}.issuperset(self.objective.needs)", "TEACHER}", PROBE),
    # rewards
    reward("advantage[known] = self.weight * ", "advantage[known] = "),
    reward("// copies", "% copies"),
    reward("group[known]", "group[: int(known.sum())]"),
    reward("if reward.shape != (len(rollouts),):", "if False:"),
    reward("if reward.isinf().any():", "if False:"),
    reward("if copies == 1 and self.advantage.compares:", "if False:"),
    reward("if len(rollouts) else torch.zeros(0)", ""),
    advantages("* count / (count - 1).clamp(min=1)", ""),
    advantages("variance.sqrt() + self.epsilon", "variance.sqrt()"),
    advantages("return reward - group_mean(reward, group)", "return reward - reward.mean()"),
    advantages("torch.where(_differs(reward, group),", "torch.where(variance > 0,"),
    stages("rollouts.columns |= columns", "pass", REWARDS),
    # PPO
    critic("to_come + gamma * after", "to_come + after"),
    critic("gamma * gae_lambda * following", "gae_lambda * following"),
    critic("gamma * gae_lambda * following", "gamma * following"),
    critic("torch.where(here, found, zero)", "found"),
    critic("following = torch.where(here, found, following)", "following = found"),
    critic("after = torch.where(here, values[:, t], after)", "after = values[:, t]"),
    critic("to_come = torch.where(here, zero, to_come)", "to_come = zero"),
    critic("torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)", "hidden"),
    critic("self.xx.addmm_(x.T, x)", "self.xx.copy_(x.T @ x)"),
    critic("self.xy.addmv_(x.T, y)", "self.xy.copy_(x.T @ y)"),
    critic("squares - sums.square() / count.clamp(min=1)", "squares"),
    critic("torch.maximum(varying, FLOOR * squares).clamp(min=TINY)", "varying"),
    critic("held = damping * ", "held = "),
    critic("xy - xx @ old)", "xy)"),
    critic("self.weight.copy_(old + step)", "self.weight.copy_(step)"),
    critic("(values - mean).square()", "values.square()"),
    critic("reduce_sum(sums)", "sums", f"{PPO} -k 'two_processes and ddp'"),
    critic("reduce_sum(self.xx)", "self.xx", f"{PPO} -k 'two_processes and ddp'"),
    critic("reduce_sum(self.xy)", "self.xy", f"{PPO} -k 'two_processes and ddp'"),
    critic(
        'register_buffer("weight", torch.zeros(width + 1))',
        'register_buffer("weight", torch.zeros(width + 1), persistent=False)',
        f"{PPO} -k resumed_run",
    ),
    critic('if f"{prefix}weight" in state_dict:', "if True:", f"{PPO} -k goes_on"),
    critic("0 <= self.gamma <= 1", "0 <= self.gamma", PPO_INPUT),
    critic("0 <= self.gae_lambda <= 1", "self.gae_lambda <= 1", PPO_INPUT),
    critic("0 < self.damping < math.inf", "0 <= self.damping < math.inf", PPO_INPUT),
    critic("        return False\n", "        return True\n", PPO_INPUT),
    stages(
        "dataclasses.replace(rollouts, columns={**rollouts.columns, ROW: numbers})",
        "dataclasses.replace(rollouts, columns={**rollouts.columns, ROW: numbers.flip(0)})",
        PPO_STEPS,
    ),
    stages(
        "reward, values, of, gamma=gae.gamma",
        "reward, values, micro.mask.cpu(), gamma=gae.gamma",
        PPO_STEPS,
    ),
    stages(
        "x[of[micro.mask.cpu()].to(device)], (found + values)[of].to(x)",
        "x[of[micro.mask.cpu()].to(device)], found[of].to(x)",
        PPO_STEPS,
    ),
    stages(
        "filled = (micro.counts > 0).cpu()",
        "filled = (micro.counts > -1).cpu()",
        f"{PPO} -k made_for_other",
    ),
    stages("if gae.normalize:", "if True:", PPO_STEPS),
    stages(
        "(math.sqrt(variance) + EPSILON) * counted", "(math.sqrt(variance) + EPSILON)", PPO_STEPS
    ),
    stages("(weight * advantages).float()", "advantages.float()", PPO_STEPS),
    stages("critic.fit(moments.summed(reduce_sum), gae.damping)", "pass", PPO_STEPS),
    stages(
        "rollouts.mask & ~rollouts.columns[REWARD].isnan()[:, None]", "rollouts.mask", PPO_STEPS
    ),
    stages("shares if advantage.ndim == 1 else shares[:, None]", "shares.mean()", PPO_STEPS),
    stages("1 - variance / of_returns", "variance / of_returns", PPO_STEPS),
    # RL
    gradient("rho.clamp(1 - low, 1 + high)", "rho.clamp(1 - high, 1 + low)"),
    gradient("torch.minimum(rho * advantage", "torch.maximum(rho * advantage"),
    gradient("(logr_y - logp_y).clamp(-20, 20)", "(logp_y - logr_y).clamp(-20, 20)"),
    gradient("(logr_y - logp_y).clamp(-20, 20)", "(logr_y - logp_y)"),
    gradient("log_ratio.expm1() - log_ratio", "-log_ratio"),
    clipped("above & (advantage > 0)", "above & (advantage >= 0)"),
    clipped("below & (advantage < 0)", "below"),
    clipped("1 + self.clip_high, rho <", "1 + self.clip_low, rho <"),
    clipped("loss + self.kl * k3", "loss + k3"),
    clipped("if self.kl else {}", ""),
    clipped("0 < self.clip_low <= 1", "0 <= self.clip_low <= 1"),
    clipped("        return True\n", "        return False\n"),
    of("opd/objectives/weighted.py", "tests/objectives/test_clipped.py")(
        "return self.objective.needs_reward", "return False"
    ),
    rl("(longest - self.buffer)", "longest"),
    rl("1 <= self.buffer <= longest <=", "0 <= self.buffer <= longest <="),
    rl("longest <= max_new_tokens:", "longest:"),
    rl("OUTCOME: outcome.to(", "OUTCOME: reward.to("),
    rl("(beyond / self.buffer).clamp(0, 1)", "(beyond / self.buffer).clamp(max=1)"),
    rl("(beyond / self.buffer).clamp(0, 1)", "(beyond / self.buffer).clamp(min=0)"),
    rl("nan_to_num(math.inf).amin", "nan_to_num(0).amin"),
    rl("nan_to_num(-math.inf).amax", "nan_to_num(9).amax"),
    rl("reduce_sum(\n", "(\n"),
    rl("tokens / completions / lengths", "tokens / lengths"),
    step('term.per == "completion"', 'term.per != "completion"', GRPO_STEPS),
    stages(
        "equal_shares(rollouts.counts, module.world.sum)", "1.0 + 0 * rollouts.counts", GRPO_STEPS
    ),
    stages("rollouts.counts, module.world.sum)", "rollouts.counts, lambda own: own)", TWO_OF_RL),
    step("columns[OUTCOME], copies", 'columns["reward"], copies', f"{RL} -k lengths_alone"),
    module("reward.overlong.check(max_new_tokens)", "pass", RL_INPUT),
    step("start <= place < start + fewest", "start <= place <= start + fewest", DYNAMIC),
    step("i * world.size + world.rank for i", "i for i", ALL_RANKS),
    step("        if found >= fewest:\n", "        if found > fewest:\n", DYNAMIC),
    step("found += int(world.sum(", "found += int((", ALL_RANKS),
    step("rows += [some[i] for i in kept]", "rows += kept", DYNAMIC),
    step("dropped[kept] = 0.0", "pass", DYNAMIC),
    step("Rollouts.concatenate(filled or parts[:1]", "Rollouts.concatenate(filled", DYNAMIC),
    step("drawn[_completions(rows, copies)]", "drawn[: len(rollouts)]", DYNAMIC),
    step("found = {name: v[measured] for measured, name in own}", "found = {}", GRPO_STEPS),
    step("if module.teachers else []", "", ALONE),
    metrics(
        "    if TEACHER not in both.opinions:\n        return values\n    values[",
        "    values[",
        ALONE,
    ),
    metrics(
        "    if TEACHER not in both.opinions:\n        return values\n    values |=",
        "    values |=",
        NO_TEACHER,
    ),
    module("if self.teacher_sources else WITHOUT_TEACHER", "", RL_INPUT),
    module("if self.objective.needs_reward and reward is None:", "if False:", RL_INPUT),
    module("or self.objective.needs_drift:", "or False:", RL_INPUT),
    module("size < (self.reward.dynamic or 0)", "size < 0", RL_INPUT),
    scores("        if not module.teachers:\n", "        if False:\n", RL_INPUT),
    of("callbacks/effopd.py", RL_INPUT)("        self.score.check(pl_module)\n", ""),
    # the mixture
    mixture('derive_seed(seed, p.row, "fixed")', 'derive_seed(p.row, "fixed")'),
    mixture("and prompt.completion_ids is not None for", "for"),
    mixture("())[:limit]", "())"),
    mixture("own[-1] in sampler.eos_token_ids", "True"),
    mixture("next(of_fixed if own else of_sampled)", "next(of_sampled if own else of_fixed)"),
    stages("given(copied, sampler)", "given(fixed, sampler)", MIXTURE),
    stages('found["moved"] *= sampled', "pass", MIXTURE),
    stages("if SAMPLED in rollouts.columns:", "if False:", MIXTURE),
    stages("values[ENGINE_GAP][sampled]}", "values[ENGINE_GAP]}", MIXTURE),
    stages("(~sampled).double()", "sampled.double()", MIXTURE),
    step("micro.keep_sampled(v[ENGINE_GAP])", "v[ENGINE_GAP]", MIXTURE),
    step('reading.micro.keep_sampled(v["ratio"])', 'v["ratio"]', MIXTURE),
    step("len(rollouts.keep_sampled(rollouts.tokens))", "rollouts.num_tokens", MIXTURE),
    reuse("if SAMPLED in rollouts.columns:", "if False:", MIXTURE),
    prompt_format("ids[-1:] == end", "False", MIXTURE),
    prompt_format("ids if ids[-1:] == end else", "ids if True else", MIXTURE),
    prompt_format("tokenizer(given, add_special_tokens=False)", "tokenizer(given)", MIXTURE),
    module("if mixture is not None and self.objective.needs_drift:", "if False:", DRIFT),
    # drift
    weighted("apart.cumsum(dim=1) - apart", "apart.cumsum(dim=1)", DRIFT),
    weighted(".double().abs()", ".double()", DRIFT),
    weighted("1 + self.gamma * (1 - tokens", "1 + self.gamma * (tokens", DRIFT),
    weighted("self.objective.needs_drift or self", "self", DRIFT),
    step("stages.drifted(module, asked.popleft())", "asked.popleft()", DRIFT),
    of("opd/tokens.py", DRIFT)("theirs.log_softmax(dim=-1).gather(", "theirs.gather("),
    # teachers' own renderings
    prompt_format("if theirs != prompts[i].token_ids:", "if True:", RENDERED),
    prompt_format("teachers.get(prompt.teacher, student)", "student", RENDERED),
    prompt_format(
        "mine = [i for i in mine if contexts[i] is not None]",
        "pass",
        RENDERED,
        why="slower, and the same tokens",
    ),
    prompt_format(
        "fmt.check_template(rendered, where, tokenizer, arguments=False)", "pass", RENDERED
    ),
    prompt_format("if chats and arguments else ()", "if chats else ()", RENDERED),
    module("models.check_tokenizers(self.tokenizer, own, source)", "pass", READERS),
    module("next(iter(found)) if len(found) == 1 else DEFAULT", "DEFAULT", READERS),
    prompt_data("teachers=readers,", "", READERS),
    # the geometry of updates
    geometry('not own.endswith("bias") and', ""),
    geometry("module not in ROUTERS", "True"),
    geometry("torch.finfo(dtype).eps / 2 * size", "torch.finfo(dtype).eps * 2 * size"),
    geometry("squares[: math.ceil(len(s) / 100)]", "squares[: len(s) // 100]"),
    geometry("float((top / total).sqrt())", "float(top / total)"),
    geometry("p = s / s.sum()", "p = squares / total"),
    geometry("float(s[0] / total.sqrt())", "float(s[0] / s.sum())"),
    geometry("self.u[:, kept] * self.s[kept]", "self.u[:, kept]"),
    geometry("values.flip(0)[:k], vectors.flip(1)[:, :k]", "values[-k:], vectors.flip(1)[:, :k]"),
    geometry("part[..., ::-1].copy()", "part.copy()"),
    geometry("return whole.s, whole.leading(k)", "return whole.s[:k], whole.leading(k)"),
    geometry("_large(matrix, gram, k)", "_large(matrix, gram, k + 1)"),
    geometry("1 / s, 0.0)", "1 / s, 1 / s)"),
    geometry("or not 0 < float(gram.trace()) < math.inf", ""),
    geometry("own + strength * (final_norm - own)", "final_norm"),
    geometry("(one * other).sum(dim=0).abs()", "(one * other).sum(dim=0)"),
    geometry("float(direction @ found[-1]) < 0", "float(direction @ found[0]) < 0"),
    geometry("rows.double() - rows.double().mean(dim=0)", "rows.double()"),
    # opd analyze
    tensors('set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values())', "[]"),
    tensors("if not path.is_file():", "if False:"),
    tensors("if name != HEAD or not is_tied(one):", "if name != HEAD:"),
    tensors("if ours != theirs:", "if False:"),
    tensors("or adapters.is_adapter(folder)", ""),
    tensors("elif checkpoints.is_sharded(path):", "elif False:", why="the same, all at once"),
    updates("if found in MATRICES and (layer is", "if False and (layer is"),
    updates("all(map(is_tied, tensors))", "False"),
    updates("all(map(is_tied, tensors))", "True"),
    updates("shape[0] if len(shape) == 3 else 1", "1"),
    updates(
        "if not found.isfinite().all():", "if False:", f"{ANALYZE} -k nothing", why="norms say so"
    ),
    updates("if not math.isfinite(squares):", "if False:"),
    updates(
        "by_step.setdefault(checkpoints.read_step(path), path)", "by_step[len(by_step)] = path"
    ),
    updates("number if step is None else step", "number"),
    spectra("if not any(norms.values()):", "if False:"),
    spectra('"cosine_mean": float(cosines.mean())', '"cosine_mean": float(cosines[0])'),
    spectra("run[-1].of.u[:, :count])", "run[0].of.u[:, :count])"),
    spectra("int((self.of.s > self.noise).sum())", "len(self.of.s)"),
    spectra("count = min(one.count, run[-1].count)", "count = run[-1].count"),
    spectra("max(before.dtype, after.dtype, key", "min(before.dtype, after.dtype, key"),
    spectra('if row.get("norm", 1.0) > 0]', "]"),
    spectra("bool(directions) and len(run) > 1", "len(run) > 1"),
    scored(
        "judge(everything(updates, last, a) if a else _nothing)", "judge(everything(updates, last))"
    ),
    scored('"norm": a * norm', '"norm": norm'),
    scored(
        "range(centre - radius, centre + radius + 1)", "range(centre - radius, centre + radius)"
    ),
    scored("updates.places[name].group == group and", ""),
    scored('wanted if part == "top" else None', "wanted"),
    scored("r - kept).part(0)", "kept).part(0)"),
    scored("is not None and self._norms[name]:", "is not None:"),
    scored(
        "if not set(groups) <= {", "if False and {", why="a row more, with the numbers of another"
    ),
    judge("torch.no_grad(), in_eval_mode(module.student):", "torch.no_grad():"),
    scored("for checkpoint in run[:-1]:", "for checkpoint in run:"),
    scored("final[name], b)", "final[name], 1.0)"),
    judge("value if delta is None else value.double() + delta.double()", "value"),
    judge(
        'per_problem(found["samples"][name], "avg@")',
        'per_problem(found["samples"][name], "length")',
    ),
    analyze("if taken and not overwrite:", "if False:"),
    pages("rows := tables.get(name)", "rows := None"),
    # what agrees with the paper
    findings("holds = opd > rl if larger == OPD else rl > opd", "holds = opd > rl"),
    findings("norm = min(curve[-1][0]", "norm = max(curve[-1][0]"),
    findings("max(map(abs, changes)) <= TINY_CHANGE", "min(map(abs, changes)) <= TINY_CHANGE"),
    findings('row["step"] == step]\n\n\ndef _spectral', "row]\n\n\ndef _spectral"),
    findings(
        "share = max(curve[0][0]", "share = min(curve[0][0]", why="both begin alike in a study"
    ),
    findings("min(shares) > RECOVERED", "max(shares) > RECOVERED"),
    findings("of[1.0] >= EARLY_RECOVERED * final and", ""),
    findings("and of[1.0] > of[0.0]", ""),
    findings("min(centres) < best[run]", "min(centres) <= best[run]"),
    findings("best[run] < max(centres)", "best[run] <= max(centres)"),
    findings('r["matrices"] == max(', 'r["matrices"] <= max('),
    findings("holds &= min(centres)", "holds = min(centres)"),
    results("mean[name] = sum(values) / len(values)", "mean[name] = sum(values)"),
    results("if name in row]  # a direction", "]  # a direction"),
    results('cost.read_text("utf-8")]', '""]'),
    results('("Accelerators", ACCELERATORS)]:', "]:"),
    results("if study == OWN_STUDY else []", ""),
    results('or note.read_text("utf-8") != made_of', ""),
    results('"runs": summaries}', '"runs": 0}'),
    results("if key in NUMBERS:", "if False:"),
    results("if method in found.setdefault(seed, {}) or", "found.setdefault(seed, {})\n        if"),
    results("runs.keys() != {OPD, RL}", "False"),
]
