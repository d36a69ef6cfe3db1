#!/usr/bin/env bash
# Run the tests under every Python that is here, each with the fairseq it gets; `make test-matrix`.
#
#   VERSIONS="3.10 3.12" make test-matrix        some of 3.10, 3.11 and 3.12
#   FAIRSEQ_MAIN=/path/to/fairseq make test-matrix   and fairseq's main, a checkout, on Python 3.10
#   TESTS="tests/fairseq -k resume" make test-matrix other tests, as arguments of pytest
#
# One environment each in .matrix/, made once and again when pyproject.toml changes. pip's own
# settings hold: where it finds torch only with CUDA, an environment takes 6 GB. Exit 1 if any
# environment cannot be made, any test fails or nothing could be tested, 2 if it is asked for what
# cannot be.
set -uo pipefail
cd "$(dirname "$0")/.."

known="3.10 3.11 3.12"
environments=(${VERSIONS:-$known})
if [ ${#environments[@]} -eq 0 ]; then
  echo "matrix: VERSIONS names no Python; name some of $known, or unset it" >&2
  exit 2
fi
for name in "${environments[@]}"; do
  case " $known " in
    *" $name "*) ;;
    *) echo "matrix: VERSIONS has $name, and l2t runs on $known; take it out" >&2; exit 2 ;;
  esac
done
if [ -n "${FAIRSEQ_MAIN:-}" ]; then
  if [ ! -e "$FAIRSEQ_MAIN/fairseq/version.txt" ]; then
    echo "matrix: FAIRSEQ_MAIN=$FAIRSEQ_MAIN is no checkout of fairseq" >&2
    exit 2
  fi
  FAIRSEQ_MAIN=$(cd "$FAIRSEQ_MAIN" && pwd)
  environments+=(main)
fi
tests=(${TESTS:-tests/core tests/vision tests/fairseq tests/cli})
ran=() skipped=() failed=()
# One torch for every environment. pip up to 25.2 reads the first name for builds too, later ones
# the second; for the installation only, for tests run pip in other folders.
constraints=(PIP_CONSTRAINT="$PWD/constraints.txt" PIP_BUILD_CONSTRAINT="$PWD/constraints.txt")

find_python() {
  local candidate
  for candidate in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python /opt/python/"$1"*/bin/python; do
    if "$candidate" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" \
        2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

install() {
  local name=$1 python=$2 folder=$3 source=.matrix/fairseq-main
  "$folder/bin/python" -c 'import pip' 2>/dev/null || rm -rf "$folder"
  [ -x "$folder/bin/python" ] || "$python" -m venv "$folder" || return
  # fairseq 0.12.2 and main ask for an omegaconf whose metadata pip 24.1 and later refuse.
  if "$folder/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then
    "$folder/bin/python" -m pip install --quiet 'pip<24.1' || return
  fi
  if [ "$name" != main ]; then
    env "${constraints[@]}" "$folder/bin/python" -m pip install --quiet --editable '.[nmt,test]'
    return
  fi
  # A copy, for fairseq's build writes into its own folder. Without the extra `nmt`: it names 0.12.2,
  # and main calls itself so, too.
  rm -rf "$source"
  cp -R "$FAIRSEQ_MAIN" "$source" || return
  env "${constraints[@]}" "$folder/bin/python" -m pip install --quiet --editable '.[test]' \
    && env "${constraints[@]}" "$folder/bin/python" -m pip install --quiet "./$source"
}

describe() {
  "$1/bin/python" -c 'import logging; logging.disable()
import fairseq, fairseq.data.data_utils_fast, numpy, torch
print(f"fairseq {fairseq.__version__}, torch {torch.__version__}, numpy {numpy.__version__}")'
}

commit_of() { # of a checkout, where it is one of git's
  { [ -e "$1/.git" ] && git -C "$1" rev-parse --short HEAD 2>/dev/null; } || echo "of unknown commit"
}

for name in "${environments[@]}"; do
  folder=.matrix/$name
  version=$name
  [ "$name" != main ] || version=3.10
  python=$(find_python "$version")
  if [ -z "$python" ]; then
    skipped+=("$name (no python$version with venv)")
    continue
  fi
  if [ ! "$folder/.installed" -nt pyproject.toml ]; then
    echo "$name: installing into $folder (some minutes, once)"
    if ! install "$name" "$python" "$folder"; then
      failed+=("$name (could not be installed)")
      continue
    fi
    touch "$folder/.installed"
  fi
  if ! found=$(describe "$folder"); then
    failed+=("$name (fairseq cannot be imported; if its extensions are for another numpy: rm -r $folder, pip cache purge)")
    continue
  fi
  [ "$name" != main ] || found="$found, main $(commit_of "$FAIRSEQ_MAIN")"
  echo "$name: $found"
  if "$folder/bin/python" -m pytest -q "${tests[@]}"; then
    ran+=("$name ($found)")
  else
    failed+=("$name ($found)")
  fi
done

for entry in ${ran[@]+"${ran[@]}"}; do echo "passed:  $entry"; done
for entry in ${skipped[@]+"${skipped[@]}"}; do echo "skipped: $entry"; done
for entry in ${failed[@]+"${failed[@]}"}; do echo "failed:  $entry"; done
if [ ${#ran[@]} -eq 0 ] && [ ${#failed[@]} -eq 0 ]; then
  echo "matrix: nothing was tested, for none of these Pythons is here; install one" >&2
  exit 1
fi
[ ${#failed[@]} -eq 0 ]
