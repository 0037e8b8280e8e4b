"""What is in the wheel, and that it works from there."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path
from textwrap import dedent
from zipfile import ZipFile

import pytest
from mmengine.config import Config

import polynl_mm

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {
    'polynl_mm': 'polynl_mm',
    'configs': 'polynl_mm/configs',
    'projects/mini_data': 'polynl_mm/projects/mini_data',
    'tools': 'polynl_mm/tools',
}
# Set-up scripts: without a checkout there is nothing to set up.
NOT_SHIPPED = {
    f'tools/{name}.sh' for name in ('quickstart', 'run_tests', 'setup_env')
}

pytestmark = pytest.mark.skipif(
    not (ROOT / '.git').exists(), reason='git tells what the sources are'
)


def run(*command, cwd, **env):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.strip()


def sources():
    """Every file of the checkout that is or may be committed."""
    listed = run('git', 'ls-files', '-coz', '--exclude-standard', cwd=ROOT)
    return sorted(n for n in listed.split('\0') if (ROOT / n).is_file())


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A copy of the sources, and in it a config with a relative base."""
    copy = tmp_path_factory.mktemp('checkout')
    for name in sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    for name, text in {
        'configs/_base_/added/base.py': 'a = dict(b=1, c=2)\n',
        'configs/added/leaf.py': (
            "_base_ = '../_base_/added/base.py'\na = dict(c=3)\n"
        ),
    }.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
    return copy


@pytest.fixture(scope='module')
def installed(checkout, tmp_path_factory):
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp('wheel')
    pip('wheel', '--wheel-dir', folder, checkout, cwd=folder)
    (wheel,) = folder.glob('*.whl')
    assert wheel.name == f'polynl_mm-{polynl_mm.__version__}-py3-none-any.whl'
    with ZipFile(wheel) as archive:
        archive.extractall(folder / 'installed')
    return folder / 'installed'


def pip(command, *args, cwd):
    offline = ('--no-index', '--no-deps', '--no-build-isolation')
    run(sys.executable, '-m', 'pip', command, *offline, *args, cwd=cwd)


def files_in(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob('*')
        if path.is_file()
    }


def metadata(folder):
    (info,) = folder.glob('polynl_mm-*.dist-info')
    return PathDistribution(info)


def test_wheel_holds_all_that_is_shipped(checkout, installed):
    expected = {
        name.replace(top, target, 1): checkout / name
        for top, target in SHIPPED.items()
        for name in files_in(checkout)
        if name.startswith(f'{top}/') and name not in NOT_SHIPPED
    }
    assert NOT_SHIPPED <= files_in(checkout)
    assert 'polynl_mm/configs/_base_/added/base.py' in expected
    (info,) = installed.glob('*.dist-info')
    got = {n for n in files_in(installed) if not n.startswith(info.name)}
    assert got == set(expected)
    for name, source in expected.items():
        assert (installed / name).read_bytes() == source.read_bytes()


def test_wheel_has_the_licence_and_needs_nothing(installed):
    dist = metadata(installed)
    licences = [p for p in installed.rglob('LICENSE') if p.is_file()]
    assert [p.read_text() for p in licences] == [
        (ROOT / 'LICENSE').read_text()
    ]
    assert dist.version == polynl_mm.__version__
    assert dist.metadata['License'] == 'Apache-2.0'
    assert dist.requires
    hard = [r for r in dist.requires if 'extra ==' not in r.partition(';')[2]]
    assert not hard
    assert set(dist.metadata.get_all('Provides-Extra')) == {
        'det',
        'export',
        'seg',
        'onedl-det',
        'onedl-seg',
        'mini',
        'tests',
    }


def test_page_of_the_package_stands_alone(installed):
    """Nothing beside it is there to be linked, and no address is known."""
    meta = metadata(installed).metadata
    assert meta['Author'] == 'polynl_mm contributors'
    page = meta.get_payload()
    assert page.strip() == (ROOT / 'configs/from_pip.md').read_text().strip()
    links = re.findall(r'\]\((.*?)\)', page)
    assert links and all(link.startswith('https:') for link in links)
    assert polynl_mm.__version__ in page


def test_configs_work_from_the_wheel(checkout, installed):
    shipped = installed / 'polynl_mm' / 'configs'
    leaf = Config.fromfile(shipped / 'added' / 'leaf.py')
    assert leaf.a == dict(b=1, c=3)
    # The files are those of the checkout, so one of each folder tells whether
    # bases are where they are looked for.
    for folder in sorted(shipped.iterdir()):
        for path in sorted(folder.glob('*.py'))[:1]:
            original = checkout / 'configs' / path.relative_to(shipped)
            got, expected = Config.fromfile(path), Config.fromfile(original)
            assert got.to_dict() == expected.to_dict()


def test_layer_resolves_from_the_wheel(installed, tmp_path):
    code = """
    from mmengine.registry import MODELS
    layer = MODELS.build(dict(type='polynl_mm.PolyNL2d', in_channels=2))
    import polynl_mm
    print(polynl_mm.__file__)
    print(polynl_mm.config_path('retinaface_r50-polynl_mini-wider'))
    """
    found = run(
        sys.executable,
        *('-W', 'ignore', '-c', dedent(code)),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    package, config = map(Path, found.splitlines()[-2:])
    assert package == installed / 'polynl_mm' / '__init__.py'
    assert config == (
        package.parent / 'configs/mini/retinaface_r50-polynl_mini-wider.py'
    )


def test_commands_of_the_page_from_the_wheel(installed, tmp_path):
    """One after the other, in one process, as an import takes seconds."""
    pytest.importorskip('mmdet')
    pytest.importorskip('skimage')
    page = (ROOT / 'configs/from_pip.md').read_text()
    (own,) = re.findall(
        r'^```python\n(_base_ = __import__.*?)^```', page, re.M | re.S
    )
    (tmp_path / 'own.py').write_text(own)
    commands = re.findall(r'^    python -m (.*)$', page, re.M)
    assert len(commands) == 4
    code = f"""
    import runpy, sys
    for command in {commands}:
        module, *args = command.split()
        sys.argv = [module, *args]
        runpy.run_module(module, run_name='__main__', alter_sys=True)
    import polynl_mm
    print(polynl_mm.__file__)
    """
    told = run(
        sys.executable,
        *('-W', 'ignore', '-c', dedent(code)),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    package = installed / 'polynl_mm'
    assert Path(told.splitlines()[-1]) == package / '__init__.py'
    (published,) = tmp_path.glob('digits-*.pth')
    assert published.name in told
    assert re.search(r'accuracy/top1: \d', told)


def test_tools_in_the_wheel_hide_no_other_package(installed, tmp_path):
    """``import ops`` must not mean ``polynl_mm.ops`` there."""
    package = installed / 'polynl_mm'
    tools = sorted((package / 'tools').glob('*.py'))
    assert {'train.py', 'test.py'} <= {tool.name for tool in tools}
    code = f"""
    import runpy, sys
    for tool in {[str(tool) for tool in tools]}:
        runpy.run_path(tool, run_name='not main')
        assert {str(package)!r} not in sys.path, tool
    import polynl_mm
    print(polynl_mm.__file__)
    """
    found = run(
        sys.executable,
        *('-W', 'ignore', '-c', dedent(code)),
        cwd=tmp_path,
        PYTHONPATH=str(installed),
    )
    assert Path(found) == package / '__init__.py'


def test_editable_install_imports_the_checkout(checkout, tmp_path):
    pip(
        'install',
        *('--ignore-installed', '--prefix', tmp_path, '--editable', checkout),
        cwd=tmp_path,
    )
    (info,) = tmp_path.rglob('polynl_mm-*.dist-info')
    code = f"""
    import site
    from importlib.util import find_spec
    site.addsitedir({str(info.parent)!r})
    for name in ('polynl_mm', 'polynl_mm.ops', 'polynl_mm.faces'):
        print(find_spec(name).origin)
    """
    # Without the site-packages of this environment.
    found = run(
        sys.executable, '-I', '-S', '-c', dedent(code), cwd=tmp_path
    ).splitlines()
    package = checkout / 'polynl_mm'
    assert [Path(path) for path in found] == [
        package / '__init__.py',
        package / 'ops' / '__init__.py',
        package / 'faces' / '__init__.py',
    ]
    assert metadata(info.parent).version == polynl_mm.__version__


def test_image_has_the_versions_of_the_setup():
    setup = (ROOT / 'tools/setup_env.sh').read_text()
    official = setup[setup.index('official)') : setup.index('onedl)')]
    versions = dict(re.findall(r'(mm\w+)==([\d.]+)', official))
    assert set(versions) == {'mmengine', 'mmcv', 'mmdet', 'mmsegmentation'}
    image = (ROOT / 'docker/Dockerfile').read_text()
    image = image.replace('${MMCV}', re.search(r'ARG MMCV=(\S+)', image)[1])
    assert dict(re.findall(r'(mm\w+)==([\d.]+)', image)) == versions


def test_top_level():
    """What was left there by chance would be shipped to all."""
    top = {name.partition('/')[0] for name in sources()}
    assert top == {
        *('polynl_mm', 'configs', 'tools', 'tests', 'projects', 'docker'),
        *('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'CITATION.cff'),
        *('LICENSE', 'setup.cfg', 'pyproject.toml', '.ci', '.gitignore'),
    }
