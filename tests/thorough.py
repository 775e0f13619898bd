"""What a thorough run (`python3 scripts/test.py --thorough`) asks beside the usual one."""

import os

import pytest

THOROUGH = os.environ.get("SPECMEMO_TEST_THOROUGH") == "1"
only_thorough = pytest.mark.skipif(not THOROUGH, reason="asked in a thorough run")
