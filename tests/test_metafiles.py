"""What ``mim search polynl_mm`` tells: every config, and measured numbers."""

import json
from pathlib import Path

import pytest

pytest.importorskip('mmengine')

from mmengine.fileio import load  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'
INDEX = load(ROOT / 'polynl_mm/model-index.yml')
MODELS = [
    model for part in INDEX['Import'] for model in load(ROOT / part)['Models']
]
# Metrics as a test with the config's own seed wrote them, and the commands.
RESULTS = Path(__file__).parent / 'data/results'


def test_every_config_is_there_once():
    leaves = {
        path.relative_to(ROOT).as_posix()
        for path in CONFIGS.glob('*/*.py')
        if path.parent.name != '_base_'
    }
    assert sorted(model['Config'] for model in MODELS) == sorted(leaves)
    for model in MODELS:
        assert model['Name'] == Path(model['Config']).stem


def test_what_is_named_is_there():
    collections = {each['Name']: each for each in INDEX['Collections']}
    assert {model['In Collection'] for model in MODELS} == set(collections)
    for each in collections.values():
        assert (ROOT / each['README']).is_file()
    for model in MODELS:
        block = model['In Collection'].replace('-', '').lower()
        expected = [b for b in ('polynl', 'polysa') if b in model['Name']]
        assert (expected or ['rivals']) == [block]


def test_every_number_was_measured():
    """And each that was measured stands there."""
    told = {
        model['Name']: model['Results']
        for model in MODELS
        if 'Results' in model
    }
    assert set(told) == {path.stem for path in RESULTS.glob('*.json')}
    for name, results in told.items():
        measured = json.loads((RESULTS / f'{name}.json').read_text())
        for result in results:
            assert result['Dataset'].startswith('mini')
            for metric, value in result['Metrics'].items():
                found = measured['metrics'][metric]
                # A percentage, or a fraction.
                assert value == round(found, 2 if found > 1 else 4)
        assert measured['commands'][-1].split()[1] == 'tools/test.py'
        assert any(name in command for command in measured['commands'])
