PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: run install deb test fuzz test-browsers test-package test-deb test-pgbouncer test-versions test-pythons test-clusters torture day lint bench bench-peers lock assets clean gone

run: $(VENV)/run ## serve on http://127.0.0.1:8000 (PORT= chooses another)
	@$(BIN)/python -m demo

install: ## the libraries of the service alone, as DEPLOYMENT.md has it
	@$(INSTALL) service

deb: ## the Debian package, into dist/, for the Debian that this runs on
	@deploy/debian/build.sh

# Three at a time: most of the time they wait for servers. A file's tests share a database.
PYTEST = $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: $(VENV)/test ## the whole suite, on an embedded PostgreSQL
	@echo "Running the $$(ls tests/test_*.py | wc -l | tr -d ' ') files of tests, three at a time: some seven minutes on two cores. A percentage"
	@echo "ends each line of dots; a test that skips (s) lacks a program, and says which at the end."
	@$(PYTEST)

test-pgbouncer: $(VENV)/test ## the same through PgBouncer, but for what runs servers of its own
	$(PYTEST) --pgbouncer

test-versions: $(VENV)/test ## what has to hold on every PostgreSQL, on 13 to 17 (needs npm, which brings them)
	tests/versions.sh

test-pythons: $(VENV)/test ## what may differ on Python 3.13 and 3.14 (root; debootstrap, which brings them)
	tests/pythons.sh

test-clusters: $(VENV)/test ## Patroni, whose leader is killed (needs patroni, etcd-server and postgresql of Debian)
	$(BIN)/python -m pytest -q -s --clusters

test-package: $(VENV)/test ## what is in the Debian package (dpkg; lintian)
	$(BIN)/python -m pytest -q -o python_files=debian_package.py tests/debian_package.py

test-deb: $(VENV)/test ## the package in a bare Debian 12 and 13, from its installation to its purge (root; debootstrap)
	$(BIN)/python -m pytest -s -o python_files=bare_debian.py tests/bare_debian.py

test-browsers: $(VENV)/test ## the two pages in Firefox and in WebKit (Debian: firefox-esr, webkit2gtk-driver, xvfb)
	$(BIN)/python -m pytest -o python_files=other_browsers.py tests/other_browsers.py

fuzz: $(VENV)/test ## the C encoder under sanitizers, for ten minutes (needs gcc and Python.h)
	FUZZ_SECONDS=600 $(BIN)/python -m pytest -s tests/test_encoder.py -k no_byte

torture: $(VENV)/test ## the feed, with writers and crashes for twenty minutes
	TORTURE_SECONDS=600 $(BIN)/python -m pytest -s tests/test_torture.py

day: $(VENV)/test ## everything at once with failures in between, for an hour: does anything leak?
	DAY_SECONDS=3600 $(BIN)/python -m pytest -s tests/test_day.py

lint: $(VENV)/test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test ## rows per second, against what is possible and what is usual
	$(BIN)/python -m bench

bench-peers: $(VENV)/test ## the same beside FastAPI, Django, SQLAlchemy and PHP; writes bench/README.md and its picture
	$(BIN)/python -m bench.peers

LOCK = $(BIN)/pip-compile --quiet --upgrade --generate-hashes --strip-extras --no-header --no-emit-index-url \
  --no-emit-find-links --no-emit-trusted-host pyproject.toml
HEAD = "\# Made by make lock from pyproject.toml: change that, not this.\n"

lock: $(VENV)/run ## makes the three requirements.txt again from pyproject.toml
	$(BIN)/python -m pip install --quiet pip-tools
	for extra in "" demo tests; do \
	  file=$${extra:+$$extra/}requirements.txt; \
	  $(LOCK) $${extra:+--extra $$extra} --output-file - > $$file.new && (printf $(HEAD); cat $$file.new) > $$file; rm $$file.new; \
	done

assets: ## fetches the libraries of pages/ again, at the versions that the script names (needs npm)
	pages/vendor/fetch.sh

clean: ## all that the above made
	rm -rf $(VENV) .demo .bench .postgresql

# Before anything is installed: a sentence for what is missing, and one for what comes.
INSTALL = command -v "$(PYTHON)" >/dev/null \
  || { echo "There is no $(PYTHON): install Python 3.11 or newer, or name one as in PYTHON=python3.12 make run."; exit 1; }; \
  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "Python 3.11 or newer is needed, and this is $$("$(PYTHON)" -V 2>&1); PYTHON=python3.12 make … names another."; exit 1; }; \
  "$(PYTHON)" demo/install.py $(VENV)

# A Python that is gone, as after an upgrade of the system, takes all that was installed along.
GONE = $(shell [ -x $(BIN)/python ] || echo gone)

$(VENV)/run: requirements.txt demo/requirements.txt speedups/cdr_encoder.c $(GONE)
	@$(INSTALL) run
	@touch $@

$(VENV)/test: tests/requirements.txt speedups/cdr_encoder.c $(GONE)
	@$(INSTALL) test
	@touch $(VENV)/run $@
