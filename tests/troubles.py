# ruff: noqa: E501 (sentences)
"""What commonly goes wrong: the data of docs/troubleshooting.md, beside what the code itself says.

An entry's `says` is a piece of one message of the code, which gives the rest of it. Its `test` is where that
is provoked, and `proof` words of that test which show it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Trouble:
    """One thing that goes wrong; without `says` nothing fails, and `title` is what a user sees."""

    says: str
    why: str
    do: str
    test: str
    proof: str
    title: str = ""


BAD_INPUT, BAD_DATA, HUB = "tests/test_bad_input.py", "tests/test_bad_data.py", "tests/test_hub.py"
STOPPING, MERGE = "tests/test_stopping.py", "tests/test_merge.py"
TROUBLES = (
    # 2
    Trouble(
        "there is no preset", "`PRESET` or `--env-file` names a file that is not in `env/`.",
        "Take the name that is proposed, or write that file.",
        f"{BAD_INPUT}::test_missing_preset_names_the_nearest", "Did you mean llama2-7b.env?",
    ),
    Trouble(
        "... sets ..., which is no setting", "A name in the preset is misspelt; nothing would have read it.",
        "Take the name that is proposed; all are in [options.md](options.md).",
        f"{BAD_INPUT}::test_wrong_preset", "Did you mean LEARNING_RATE?",
    ),
    Trouble(
        "make was given", "`make train NAME=...` with a name that no stage knows; make itself takes any.",
        "Take the name that is proposed.",
        f"{BAD_INPUT}::test_make_override_that_is_no_setting", "LEARNIN_RATE",
    ),
    Trouble(
        "secrets belong in the environment", "A preset is kept with the code and recorded with every run.",
        "Move the line to `env/secrets.env`, which git ignores, and give the token a new value if it was shared.",
        f"{BAD_INPUT}::test_wrong_preset", "env/secrets.env",
    ),
    Trouble(
        "is over the context of ..., ... tokens; lower it", "The base was made for rows of so many tokens.",
        "Lower `MAX_LENGTH`; longer rows are then cut, split or dropped as `ON_LONG` says.",
        f"{BAD_INPUT}::test_max_length_over_the_context", "MAX_LENGTH 513",
    ),
    Trouble(
        "nothing is asked: use", "`generate` has no prompt: an empty one is none.",
        "Give `PROMPT`, `PROMPTS_FILE` or standard input.", f"{BAD_INPUT}::test_no_prompt", "nothing is asked",
    ),
    # 65
    Trouble(
        "bad of ... rows, MAX_BAD_ROWS is", "Rows that are not JSON, lack a column, hold a number for a text, or "
        "are not UTF-8. The first are listed with file, line and byte.",
        "Mend them; or have so many left out and listed in `rejects.jsonl`, with `MAX_BAD_ROWS`.",
        f"{BAD_DATA}::test_bad_rows_are_listed_counted_and_left_out_if_told", "MAX_BAD_ROWS",
    ),
    Trouble(
        "which fit no shape", "No known shape has these columns; the nearest one is named.",
        "Rename the columns as [data.md](data.md) has them.", f"{BAD_DATA}::test_bad_data", "instrution",
    ),
    Trouble(
        "has no rows; it is empty", "A file without rows, or with a header alone.",
        "Look at what wrote it.", f"{BAD_DATA}::test_bad_data", "no rows",
    ),
    Trouble(
        "without a trainable token", "The prompt fills `MAX_LENGTH`, or a row has no answer: the loss of such rows "
        "is 0 or NaN elsewhere, and nothing is learned from them.",
        "Raise `MAX_LENGTH`, mend the rows, or leave them out as the sentence says.",
        f"{BAD_DATA}::test_rows_without_a_trainable_token", "without a trainable token",
    ),
    Trouble(
        "so answers would not stop", "The chat template puts no end behind an answer, or cuts removed it: a model "
        "that never learned to stop goes on until `MAX_NEW_TOKENS`.",
        "Choose a `CHAT_FORMAT` that ends its answers.",
        f"{BAD_DATA}::test_answers_that_would_not_stop", "end in a trained EOS",
    ),
    Trouble(
        "leaves no row to train on", "Every row was dropped: too long for `MAX_LENGTH`, empty, or a duplicate; the counts are told.",
        "Raise `MAX_LENGTH`, or mend what dropped them.",
        f"{BAD_DATA}::test_every_row_too_long", "5 too_long",
    ),
    Trouble(
        "the base model's tokenizer has no chat template", "A base that was never taught to talk has none.",
        "Choose `CHAT_FORMAT`; [data.md](data.md) has them.",
        f"{BAD_DATA}::test_no_chat_template", "no chat template",
    ),
    Trouble(
        "has no safetensors weights; convert them", "The base has pickles alone, which can hold a program and are "
        "never read.", "Load and save it once with `save_pretrained`, where you trust it.",
        f"{BAD_INPUT}::test_training_is_refused", "safetensors",
    ),
    Trouble(
        "tokens, its embeddings", "A token was added to the tokenizer and the embeddings were not resized.",
        "Remove the token, or resize the model; padding needs no token of its own here.",
        f"{BAD_INPUT}::test_vocabulary_beyond_the_embeddings", "49152",
    ),
    Trouble(
        "does not have the sha256 that its manifest says", "A file has changed since it was published: a disk, "
        "a copy that was cut off, or a hand.",
        "Make it again with `--force`, or copy it again with `python -m stages copy`.",
        f"{BAD_INPUT}::test_flipped_byte_in_the_adapter", "sha256",
    ),
    Trouble(
        "belongs to another base: ... was", "The adapter was trained on another model, or another commit of it.",
        "Use the base that its manifest names.", "tests/test_generate.py::test_an_adapter_that_is_not_right",
        "belongs to another base",
    ),
    # 66
    Trouble(
        "there is no data at", "A misspelt path; or in the image, a path that is not mounted.",
        "Files below `DATA_DIR` (`./data`) and those that DATASET names are mounted at the same path.",
        f"{BAD_INPUT}::test_missing_data", "no/such/folder",
    ),
    Trouble(
        "there is no finished ... in", "A stage was run before the one that makes its input, or that one failed.",
        "Run the stage that is named; `make train` runs `prepare-data` first.",
        f"{BAD_INPUT}::test_stage_before_its_input", "first",
    ),
    Trouble(
        "the hub has no repository", "A misspelt id, or a private repository: the hub says the same of both.",
        "Correct the id; for a private one set `HF_TOKEN`.", f"{HUB}::test_missing_or_private_repository",
        "owner/none",
    ),
    Trouble(
        "has no revision", "A misspelt commit, tag or branch.", "Look at its page, under history.",
        f"{HUB}::test_missing_revision", "'v9'",
    ),
    Trouble(
        "and HF_HUB_OFFLINE is set; run `fetch`", "The job has no network, and base or data were not brought "
        "before.", "`make fetch` where there is one; the run directory then holds both, pinned.",
        f"{HUB}::test_offline_with_nothing_cached", "HF_HUB_OFFLINE",
    ),
    # 70
    Trouble(
        "attempts in a row made no progress", "A batch service has started the job again and again. What the last "
        "three said is in the sentence; one that was killed says how large it was.",
        "Mend that: most often memory of the machine, or a `MAX_RUNTIME` that is too short for one checkpoint.",
        f"{STOPPING}::test_a_loop_of_killed_processes_ends", "no-progress",
    ),
    # 73
    Trouble(
        "cannot write ...: ......; make room", "The disk is full, a quota is used up, or the volume is read-only or another user's. "
        "What was unfinished is removed; finished artifacts and checkpoints stay.",
        "`python -m stages gc` lists what may go. For another user's folder, run as its owner or `chown` it.",
        f"{BAD_INPUT}::test_full_volume_and_then_room", "No space left",
    ),
    Trouble(
        "and no manifest: no stage made it, and it would be removed", "A folder of yours has the name that an "
        "artifact will have, as `data/` with `RUN_DIR=.`.", "Choose another `RUN_DIR`.",
        "tests/lib/run/test_artifact.py::test_a_folder_that_no_stage_made_is_left_alone", "and no manifest",
    ),
    # 75
    Trouble(
        "is in use by", "Another process works on this run directory, or one on another machine has died less than "
        "a minute ago.", "Wait, or choose another `RUN_DIR`; `python -m stages runs` shows who it is.",
        f"{STOPPING}::test_while_another_stage_is_at_work", "in use by train",
    ),
    Trouble(
        "the hub did not answer for ... (...), and it is not in the cache", "No network, a proxy, or a hub that is "
        "down.", "The same command again; with `make fetch` before, no later stage needs a network.",
        f"{HUB}::test_no_network", "network",
    ),
    Trouble(
        "the work had not stopped by itself", "A stop was asked for, and the work hung for `GRACE_SECONDS`.",
        "The same command goes on. `stacks.txt` and the log say where it hung.",
        f"{STOPPING}::test_work_that_does_not_stop_is_ended_in_time", "the work had not stopped by itself",
    ),
    # 77
    Trouble(
        "is gated: accept its terms at", "The licence was not accepted, there is no token, or it is another "
        "account's: the sentence says which.",
        "Accept the terms on the page that is named, and put that account's token into `env/secrets.env`.",
        f"{HUB}::test_gated_model", "https://huggingface.co/owner/tiny",
    ),
    Trouble(
        "HF_TOKEN holds a character", "A blank, a quote or a line end was copied with it.", "Copy it anew.",
        f"{HUB}::test_token_that_no_header_can_carry", "HF_TOKEN",
    ),
    # 78
    Trouble(
        "is stale", "An input was made from other settings or data than are asked for now: it would train on old "
        "prompts, or answer in another format.", "Run the stage that is named again.",
        f"{BAD_INPUT}::test_stale_data", "MAX_LENGTH was 64, is now 32",
    ),
    Trouble(
        "belongs to other settings", "The run directory holds a run with other settings, which is too dear to "
        "replace unasked.", "A new `RUN_DIR` for a new recipe; `--force` replaces the old run.",
        f"{STOPPING}::test_a_run_of_other_settings_is_refused", "is now",
    ),
    Trouble(
        "rendered or tokenised otherwise than in training", "Another version of a library, or a changed template: "
        "the model would be asked in a form that it never saw.",
        "Install the versions of its manifest, or train again.",
        f"{BAD_DATA}::test_data_of_another_template", "rendered or tokenised otherwise",
    ),
    Trouble(
        "needs code of its own", "The base brings a program (`trust_remote_code`), which is never run here.",
        "Choose a base that transformers knows.", f"{BAD_INPUT}::test_base_that_needs_its_own_code", "code of its own",
    ),
    Trouble(
        "is an encoder-decoder", "Only causal language models can be tuned.", "Choose another base.",
        f"{BAD_INPUT}::test_encoder_decoder", "encoder-decoder",
    ),
    # 80
    Trouble(
        "rows, which error.json names", "The learning rate is too high, or rows hold nonsense: the step was not "
        "taken, and its rows are named.",
        "Look at the rows; lower `LEARNING_RATE` in a new run, or begin anew with `--force`.",
        "tests/lib/model/test_training.py::test_nothing_is_kept_of_a_gradient_that_is_not_finite", "is not finite",
    ),
    Trouble(
        "before: it diverged", "The loss stays ten times as high as it was.",
        "Lower `LEARNING_RATE`, or raise `WARMUP`.",
        "tests/lib/model/test_conduct.py::test_the_loop_looks_at_the_level_of_every_step",
        "it diverged; lower LEARNING_RATE",
    ),
    # 81
    Trouble(
        "the GPU ran out of memory in", "Others use the GPU, or a figure of the plan was too low. Where it was, in "
        "what shape, and what to change first is in the sentence.",
        "What it says, in its order; `make doctor` shows what others take.",
        "tests/lib/model/test_shortage.py::test_training_says_where_and_what_it_was", "change first",
    ),
    # 82
    Trouble(
        "is not met", "What `GATE` asks for was not reached; the evaluation is published all the same.",
        "Read `evaluation.html`; train longer or on more data, or ask for less.",
        "tests/test_end_to_end.py::test_a_gate_that_is_not_met_ends_with_82_again_and_again", "gate-failed",
    ),
    Trouble(
        "was never trained (every B is zero)", "The adapter is as it was made: nothing was learned, or the wrong "
        "folder was named.", "Train it; where it was trained, raise `LEARNING_RATE` or the steps.",
        f"{MERGE}::test_a_sick_adapter_is_refused", "never trained",
    ),
    # Nothing fails.
    Trouble(
        "", "Its base did not learn to stop, or the prompt was written in another format than in training.",
        "Look at the stop rate of `make evaluate` and at the share of rows that end in a trained EOS, in the "
        "account of `prepare-data`; ask with `make generate`, which writes prompts as training did.",
        f"{BAD_DATA}::test_answers_that_would_not_stop", "end in a trained EOS", "The answers go on and on",
    ),
    Trouble(
        "", "A driver that is too old, or no GPU that this process sees: torch itself computes on the CPU without "
        "a word.", "`make doctor`; with `EXPECT_GPU=1` a stage ends instead.",
        "tests/tools/test_doctor.py::test_stage_refuses_a_gpu_before_anything_slow", "EXPECT_GPU",
        "It computes on the CPU, although there is a GPU",
    ),
    Trouble(
        "", "Rows are packed: several lie in one pass, each for itself, and a step has `BATCH_TOKENS` tokens.",
        "The account of `prepare-data` says what became of every row, `ledger.jsonl` which lost something.",
        f"{BAD_DATA}::test_some_rows_too_long", "ledger.jsonl", "There are fewer steps than rows suggest",
    ),
    Trouble(
        "", "Checkpoints of finished runs and what killed processes left.",
        "`python -m stages gc FOLDER` lists them, `--delete` removes them; no artifact is ever among them.",
        "tests/tools/test_gc.py::test_it_removes_what_it_lists_and_nothing_else", "--delete", "The disk fills up",
    ),
)  # fmt: skip
