"""The config reference in the docs says what the classes say."""

import importlib.util


def test_the_page_is_up_to_date(root):
  path = root / "docs" / "generate_reference.py"
  spec = importlib.util.spec_from_file_location("generate_reference", path)
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  advice = "run python docs/generate_reference.py"
  assert script.PAGE.read_text() == script.page(), advice
