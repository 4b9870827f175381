# What developers and services do with files. `run` times, `same` prints what is to be the same under every runtime.
same() { local name=$1; shift; echo "= $name: $("$@" | md5sum | cut -d' ' -f1)"; }
tree() { ( cd "$1" && find . -name .git -prune -o -type f -print0 | sort -z | xargs -0 md5sum && find . -name .git -prune -o -printf '%P %y %m %l\n' | sort ); }
as_postgres() { su postgres -c "PATH=/usr/lib/postgresql/15/bin:\$PATH; cd /; $1"; }

prepare() {
    export HOME=/root GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_DATE='2026-01-01T00:00:00Z' GIT_COMMITTER_DATE='2026-01-01T00:00:00Z'
    git config --global user.name nobody; git config --global user.email nobody@example.org
    git config --global safe.directory '*'; git config --global init.defaultBranch main
    mkdir -p /var/from/repository && cd /var/from || exit 1
    tar -cf tree.tar --exclude=__pycache__ -C /usr/lib python3.11
    tar -xf tree.tar -C repository
    git -C repository init -q && git -C repository add -A && git -C repository commit -q -m all || exit 1
    python3 - << 'END' || exit 1
import io, json, os, tarfile, zipfile
def package(name, files):
    with tarfile.open(f'{name}.tgz', 'w:gz') as archive:
        contents = {f'lib/file{n}.js': f'module.exports = {n};\n' * 20 for n in range(files)}
        contents['package.json'] = json.dumps({'name': name, 'version': '1.0.0'})
        for path, text in contents.items():
            entry = tarfile.TarInfo(f'package/{path}')
            entry.size, entry.mode = len(text), 0o644
            archive.addfile(entry, io.BytesIO(text.encode()))
os.makedirs('npm')
os.chdir('npm')
names = [f'package{n}' for n in range(25)]
for name in names:
    package(name, 20)
dependencies = {name: f'file:/var/from/npm/{name}.tgz' for name in names}
json.dump({'name': 'all', 'version': '1.0.0', 'dependencies': dependencies}, open('package.json', 'w'))
os.chdir('..')
with zipfile.ZipFile('many-1.0-py3-none-any.whl', 'w') as wheel:
    files = {f'many/module{n}.py': f'VALUE = {n}\n' * 50 for n in range(300)}
    files['many/__init__.py'] = ''
    files['many-1.0.dist-info/METADATA'] = 'Metadata-Version: 2.1\nName: many\nVersion: 1.0\n'
    files['many-1.0.dist-info/WHEEL'] = 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n'
    record = ''.join(f'{path},,\n' for path in files) + 'many-1.0.dist-info/RECORD,,\n'
    for path, text in files.items():
        wheel.writestr(zipfile.ZipInfo(path), text)
    wheel.writestr(zipfile.ZipInfo('many-1.0.dist-info/RECORD'), record)
os.makedirs('crate/src')
with open('crate/Cargo.toml', 'w') as manifest:
    manifest.write('[package]\nname = "crate"\nversion = "1.0.0"\nedition = "2021"\n')
for module in range(8):
    with open(f'crate/src/m{module}.rs', 'w') as source:
        for n in range(30):
            source.write(f'pub fn f{n}(x: u64) -> String {{ format!("{{}}", x.wrapping_mul({n} + {module})) }}\n')
with open('crate/src/main.rs', 'w') as source:
    source.write(''.join(f'mod m{module};\n' for module in range(8)))
    calls = ''.join(f'm{module}::f{n}(7), ' for module in range(8) for n in range(30))
    source.write(f'fn main() {{ println!("{{}}", [{calls}].concat()); }}\n')
os.makedirs('deb/DEBIAN')
os.makedirs('deb/opt/many')
with open('deb/DEBIAN/control', 'w') as control:
    control.write('Package: many\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: files\n')
for n in range(500):
    with open(f'deb/opt/many/file{n}', 'w') as file:
        file.write(f'{n}\n' * 200)
END
    ( cd npm && npm install --package-lock-only --offline --no-audit --no-fund ) > /dev/null || exit 1
    dpkg-deb --root-owner-group -Znone --build deb many.deb > /dev/null || exit 1
}

two_writers() {
    python3 - "$1" << 'END'
import multiprocessing, sqlite3, sys
path = sys.argv[1]
def connect():
    return sqlite3.connect(path, timeout=600, isolation_level=None)
def write(who):
    connection = connect()
    for n in range(100):
        connection.execute('BEGIN IMMEDIATE')
        connection.execute('INSERT INTO t VALUES (?, ?)', (who, n))
        connection.execute('COMMIT')
connection = connect()
assert connection.execute('PRAGMA journal_mode=WAL').fetchone() == ('wal',)
connection.execute('CREATE TABLE t (who INTEGER, n INTEGER)')
writers = [multiprocessing.Process(target=write, args=(who,)) for who in range(2)]
[writer.start() for writer in writers]
[writer.join() for writer in writers]
assert connection.execute('PRAGMA integrity_check').fetchone() == ('ok',)
print(connection.execute('SELECT who, count(*), sum(n) FROM t GROUP BY who ORDER BY who').fetchall())
END
}

# Where, and what is added to the names.
work() {
    local at=$1/work; mkdir "$at" || exit 1; chmod 755 "$at"; cd "$at" || exit 1
    mkdir tar npm pip deb
    run "tar x$2" tar -xf /var/from/tree.tar -C tar
    same "tar x" tree tar
    run "git clone$2" git clone -q file:///var/from/repository clone
    run "git status$2" git -C clone status --porcelain
    same "git clone" tree clone
    same "git status" git -C clone status --porcelain
    cp /var/from/npm/package.json /var/from/npm/package-lock.json npm
    cd npm; run "npm ci$2" npm ci --offline --no-audit --no-fund; cd ..
    same "npm ci" tree npm/node_modules/package7
    run "pip install$2" pip install -q --no-index --no-deps --no-compile --root-user-action ignore --target pip /var/from/many-1.0-py3-none-any.whl
    same "pip install" tree pip/many
    cp -r /var/from/crate crate
    cd crate; run "cargo build$2" cargo build -q --offline; cd ..
    same "cargo build" crate/target/debug/crate
    if [ "$1" = /root ]; then
        run "apt-get install$2" apt-get install -qq -y /var/from/many.deb
        same "apt-get install" tree /opt/many
    else
        run "dpkg -x$2" dpkg -x /var/from/many.deb deb
        same "dpkg -x" tree deb/opt/many
    fi
    run "SQLite, two writers$2" two_writers "$at/database" > "/tmp/sqlite"
    grep '^@' /tmp/sqlite
    same "SQLite" python3 -c "import sqlite3; print(sqlite3.connect('$at/database').execute('SELECT who, count(*), sum(n) FROM t GROUP BY who ORDER BY who').fetchall())"
    mkdir pg; chown postgres pg; chmod 755 /root
    run "initdb$2" as_postgres "initdb -D $at/pg -A trust"
    as_postgres "pg_ctl -D $at/pg -w -t 600 -l /tmp/pg.log -o \"-k /tmp -c listen_addresses=''\" start" > /dev/null || { cat /tmp/pg.log; exit 1; }
    run "pgbench -i$2" as_postgres "pgbench -h /tmp -i -s 1 -q postgres 2>/dev/null"
    run "pgbench$2" as_postgres "pgbench -h /tmp -c 4 -t 25 postgres 2>/dev/null"
    same "pgbench" as_postgres "psql -h /tmp -At -c 'SELECT count(*), (SELECT count(*) FROM pgbench_accounts) FROM pgbench_history' postgres"
    as_postgres "pg_ctl -D $at/pg -w -t 600 -m fast stop" > /dev/null || exit 1
    cd /; run "rm -r of all$2" rm -r "$at"
}
