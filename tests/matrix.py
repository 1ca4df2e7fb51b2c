"""What is promised, and the faults that it is promised against: the data of docs/guarantees.md.

A case is `name | exit codes that it may end with | what goes wrong, and what is made of it`. A second code
behind `then` is that of the same command given again.
"""

PROMISES = {
    "P1": "Exit 0 if and only if a complete, verified artifact exists.",
    "P2": "Killed at any instant, the same command goes on from the newest verified checkpoint.",
    "P3": "The resumed run is the uninterrupted run: the same adapter, byte for byte on the CPU.",
    "P4": "A verified checkpoint is never overwritten, nor removed before a newer one is verified.",
    "P5": "Other settings, data, base or tokenizer under the same run directory are refused, by name.",
    "P6": "Every row that is dropped or cut is counted and listed.",
    "P7": "No secret in any log, manifest, checkpoint or image layer.",
    "P8": "Any user id, a read-only root, no capabilities, no network where the inputs are local.",
    "P9": "The same exit codes everywhere; only 75, 137 and 143 are worth a retry, and it ends.",
    "P10": "A finished stage does nothing, in under two seconds.",
}
# Cases that no test injects, each with the reason in a sentence.
NO_TEST: dict[str, str] = {}

_CHECKPOINTS = """
A1 | 137 then 0 | killed while a checkpoint is saved to scratch: the newest published one goes on
A2 | 137 then 0 | killed between two files of a publication: a folder without a manifest is debris, and named
A3 | 137 then 0 | killed when the manifest is written and not flushed: whole or debris, never half
A4 | 0 | the power failed: an empty or truncated manifest is debris
A5 | 73 then 0 | the disk is full, in scratch or on the volume: what was begun is removed, older work kept
A6 | 73 | the quota is used up: as a full disk
A7 | 73 | the volume is read-only: found before anything is fetched
A8 | 0 | the volume is not mounted, and the folder is the container's own disk
A9 | 73, 66 | files of another user id: said, with what to do; our own obey the umask
A10 | 0, 65 | truncated weights: an older checkpoint goes on; an adapter is refused
A11 | 0, 65 | a bit flipped in the weights: its sha256 tells, and the file is named
A12 | 0 | a checkpoint lacks the optimizer's, the schedule's or the random state: passed over
A13 | 0 | a foreign file lies in a checkpoint
A14 | 0 | all checkpoints are corrupt: begun anew, and said
A15 | 0 | an object store without rename, append or random writes
A16 | 0 | ESTALE or EIO once, and then no more
A17 | 75 | EIO for ever
A18 | 75 | a slow volume after a stop was asked for: no checkpoint then, an end before the deadline
A19 | 0 | another node sees an old listing of a folder
A20 | 0 | clocks a year ahead or behind, file times all equal: nothing is judged by them
A21 | 75 | two runs on one run directory: the second is refused at once
A22 | 0 | the holder of a run directory was killed: taken over without help
A23 | 75 | a holder wakes up after it was taken over: it stops before it publishes
A24 | 0 | blanks, unicode, 200 letters or a leading dash in a path
A25 | 65 | a link in an artifact that leads out of it
A26 | 65 | `../` or an absolute name in a manifest
A27 | 73 | no more inodes or file handles
A28 | 0 | an old checkpoint cannot be removed: said, and gone on
A29 | 137 then 0 | killed while something is removed: what is left is debris
"""
_DATA = """
B1 | 65 | broken JSON in line 4,812: file, line and byte; more are listed, then counted
B2 | 65 | an empty file, blank lines alone, a header alone
B3 | 66 | the file is missing, a folder or unreadable
B4 | 65 | a column is missing, or misspelt in some rows
B5 | 65 | a number, a list or null where text belongs
B6 | 0 | a byte order mark, CRLF, blank lines
B7 | 65 | NUL bytes, lone surrogates, control characters
B8 | 65 | a file in latin-1: line and byte
B9 | 65 | the last line is cut off
B10 | 65 | every row is longer than MAX_LENGTH
B11 | 0, 65 | some rows are too long: cut, split, dropped or refused, and counted
B12 | 65 | nothing to learn: every label is masked
B13 | 65 | empty answers, over 1 %
B14 | 0, 65 | rows of the test split among the training rows
B15 | 0 | fewer rows than a batch holds
B16 | 65 | a row of 50 MB, a line of 5 GB without an end: memory stays bounded
B17 | 65 | an archive that expands without end, or names files outside
B18 | 65 | a key twice, NaN and Infinity
B19 | 0, 65, 78 | no chat template, a role that it refuses, special tokens as text
B20 | 65 | token ids beyond the rows of the embeddings
B21 | 78 | prepared data of another tokenizer, template or version
B22 | 0, 78 | the data set changed on the hub between two attempts
B23 | 66, 137 then 0 | prepare-data killed half-way: it goes on; train refuses what is unfinished
"""
_MODELS = """
C1 | 77 | a gated model, no or a wrong token
C2 | 66 | a misspelt model or revision
C3 | 65 | an adapter of another base
C4 | 0, 65 | an adapter without a manifest
C5 | 65 | a config with more layers than the weights have
C6 | 65 | a base that has pickles alone
C7 | 78 | a base that needs its own code
C8 | 65 | a pickle bomb as optimizer state or adapter: not run
C9 | 78 | an encoder-decoder, a vision model, experts, GPTQ: refused by name
C10 | 0 | no padding token, or one that is the end of text
C11 | 0, 78 | tied embeddings or new tokens
C12 | 73, 81 | a merge without the memory or disk for it
C13 | 82 | a merged model that does not say what base and adapter say
C14 | 0 | merging into a 4-bit base
"""
_SETTINGS = """
D1 | 2 | an unknown setting: did you mean ...?
D2 | 2 | a learning rate that is negative, 0, NaN, infinite or no number
D3 | 2, 78 | rank 0, alpha 0, dropout 1.5, targets that match nothing
D4 | 2 | MAX_LENGTH over the model's context
D5 | 0, 2 | an unknown variable of the environment
D6 | 0 | environment, preset and flag disagree: the first line says which counts
D7 | 0 | an empty variable is an unset one
D8 | 0 | quotes, `export`, CRLF and `$` in a preset
D9 | 0, 78 | bf16 on a GPU without it
D10 | 2, 0 | no PROMPT; quotes, `$`, backticks and line ends in one
D11 | 0 | no or an unwritable home, a user id without a name
D12 | 0 | standard output closed, no terminal, NO_COLOR, 80 columns, LANG=C
D13 | 0 | an odd time zone, a decimal comma
D14 | 65 | a manifest of another schema
"""
_MACHINES = """
E1 | 78, 75 | no GPU: no driver, no device, none visible or a CPU build, each by name
E2 | 78 | a driver too old for the CUDA of torch
E3 | 78 | a GPU that this torch was not built for
E4 | 81 | out of GPU memory, at the first step, a late one, in evaluate or merge
E5 | 137 then 0 | killed for the host's memory: the next attempt says so
E6 | 0 | 64 MB of shared memory
E7 | 80 | a loss or gradient that is not finite: the checkpoint before it stays, the rows are named
E8 | 80 | a loss ten times as high, for steps
E9 | 75 | the GPU falls off the bus
E10 | 75 | a step that does not end: stacks are written
E11 | 0, 78 | no C compiler for triton
E12 | 0 | others on the GPU
E13 | 0, 78 | another GPU after a resume
E14 | 0, 78 | another number of GPUs after a resume
"""
_HUB = """
F1 | 75 | names cannot be resolved
F2 | 75 | 429 with Retry-After: waited for, then given up
F3 | 0 | a download cut at 90 %: it goes on
F4 | 0, 65 | a corrupt file in the cache
F5 | 0, 75 | a proxy, a private certificate authority
F6 | 0 | offline with all inputs local: no socket is opened
F7 | 75 | a clock that breaks TLS
"""
_SIGNALS = """
G1 | 143 | SIGTERM before Python listens
G2 | 75 | SIGTERM while torch is imported
G3 | 75 | SIGTERM in a download
G4 | 75 then 0 | SIGTERM in the middle of an accumulation
G5 | 75 then 0 | SIGTERM in evaluate
G6 | 75, 0 | SIGTERM in a publication
G7 | 143 | SIGTERM twice
G8 | 75 | SIGINT as SIGTERM
G9 | 75 | SIGTERM to the process group: no orphan
G10 | 0 | a finished job given again
G11 | 70 | attempts without progress
G12 | 0, 66 | other stages while train runs read published artifacts alone
G13 | 66 | stages out of order
G14 | 78 | an input made anew after what was made from it
"""
_ANSWERS = """
H1 | 2 | an empty prompt
H2 | 2 | a prompt longer than the context
H3 | 0 | a byte order mark in a file of prompts
H4 | 2 | MAX_NEW_TOKENS of 0 or beyond the context
H5 | 0, 2 | a temperature of 0, negative, NaN
H6 | 0 | no end of text, ever: bounded
H7 | 66 | an evaluation of nothing
H8 | 80 | a figure that is NaN is a failure, not 0
H9 | 66, 2 | a gate on what was not measured
"""
AREAS = {
    "Checkpoints and storage": _CHECKPOINTS,
    "Data": _DATA,
    "Base and adapter": _MODELS,
    "Settings, command line, environment": _SETTINGS,
    "Hardware and run time": _MACHINES,
    "Network and hub": _HUB,
    "Signals and order": _SIGNALS,
    "Generate and evaluate": _ANSWERS,
}
# name -> (exit codes, text)
CASES = {
    name: (ends, text)
    for area in AREAS.values()
    for name, ends, text in (line.split(" | ") for line in area.strip().splitlines())
}
