use std::fs;
use std::path::Path;

use super::*;

/// More than a thread's stack has room for, where each takes one call or more.
const MANY: usize = 100_000;

/// What a directory is known as, and one below it that was seen there.
struct Tree {
    inodes: Inodes,
    dir: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let policy = Policy::new(false, false).unwrap();
        let root = fs::File::open(dir.path()).unwrap();
        Self { inodes: Inodes::new(root.into(), policy).unwrap(), dir }
    }

    fn root(&self) -> Arc<Inode> {
        self.inodes.get(ROOT_ID).unwrap()
    }

    /// A directory that was seen as `d` in `parent`; as which it is known is `key`.
    fn seen(&self, parent: &Arc<Inode>, key: Key) -> Arc<Inode> {
        let at = Sighting { parent: Arc::clone(parent), name: c"d".into() };
        Arc::new(Inode {
            id: self.inodes.next.fetch_add(1, Ordering::Relaxed),
            key,
            place: Place::Seen(Mutex::new(at)),
            mount: Arc::clone(&parent.mount),
            kind: libc::S_IFDIR,
            alone: false,
            no_capability: AtomicBool::new(false),
        })
    }

    /// The same of a directory there is.
    fn seen_at(&self, parent: &Arc<Inode>, path: &Path) -> Arc<Inode> {
        let dir = fs::File::open(path).unwrap();
        let stat = sys::stat(dir.as_fd(), c"").unwrap();
        self.seen(parent, key(&parent.mount, &stat))
    }
}

fn moved(inode: &Inode, parent: &Arc<Inode>) {
    let Place::Seen(at) = &inode.place else { panic!("it is held") };
    at.lock().unwrap().parent = Arc::clone(parent);
}

fn error(inode: &Inode) -> Option<i32> {
    inode.path_fd().err().and_then(|error| error.raw_os_error())
}

#[test]
fn what_is_deep_is_found_by_its_names() {
    let tree = Tree::new();
    let (mut path, mut inode) = (tree.dir.path().to_owned(), tree.root());
    for _ in 0..100 {
        path.push("d");
        fs::create_dir(&path).unwrap();
        inode = tree.seen_at(&inode, &path);
    }
    let found = sys::stat(inode.path_fd().unwrap().as_fd(), c"").unwrap();
    assert_eq!(found.attr.st_ino, inode.key.ino);
    let (middle, other) = (tree.dir.path().join("d/d/d"), tree.dir.path().join("other"));
    fs::rename(&middle, &other).unwrap();
    assert_eq!(error(&inode), Some(libc::ESTALE));
    fs::create_dir_all(&middle).unwrap();
    assert_eq!(error(&inode), Some(libc::ESTALE), "another of that name");
    fs::remove_dir(&middle).unwrap();
    fs::rename(&other, &middle).unwrap();
    assert_eq!(error(&inode), None);
}

#[test]
fn how_deep_the_guest_nests_takes_no_stack() {
    let tree = Tree::new();
    let mut inode = tree.root();
    for _ in 0..MANY {
        inode = tree.seen(&inode, inode.key);
    }
    assert_eq!(error(&inode), Some(libc::ESTALE));
    assert!(inode.is_within(&tree.root()), "too deep to say");
    drop(inode);
    assert_eq!(Arc::strong_count(&tree.root()), 2, "all of them are gone");
}

#[test]
fn a_circle_has_an_end() {
    let tree = Tree::new();
    let outer = tree.seen(&tree.root(), tree.root().key);
    let inner = tree.seen(&outer, outer.key);
    moved(&outer, &inner);
    assert_eq!((error(&outer), error(&inner)), (Some(libc::ESTALE), Some(libc::ESTALE)));
    moved(&outer, &tree.root());
}

#[test]
fn a_directory_is_not_seen_below_itself() {
    let tree = Tree::new();
    let paths = [tree.dir.path().join("d"), tree.dir.path().join("d/d")];
    fs::create_dir_all(&paths[1]).unwrap();
    let outer = tree.seen_at(&tree.root(), &paths[0]);
    let inner = tree.seen_at(&outer, &paths[1]);
    for inode in [&outer, &inner] {
        let known = Known { inode: Arc::clone(inode), lookups: 1 };
        let mut tables = tree.inodes.tables();
        tables.by_key.insert(inode.key, inode.id);
        tables.by_id.insert(inode.id, known);
    }
    let seen = |inode: &Inode, parent: &Arc<Inode>| {
        let fd = fs::File::open(tree.dir.path()).unwrap().into();
        let at = At::Fd { parent, name: c"d", fd };
        assert_eq!(tree.inodes.known(&inode.key, libc::S_IFDIR, &at), Some(inode.id));
    };
    seen(&outer, &inner);
    seen(&outer, &outer);
    assert!(outer.is_in(&tree.root()) && inner.is_in(&outer));
    // Elsewhere it is.
    seen(&inner, &tree.root());
    assert!(inner.is_in(&tree.root()));
    seen(&outer, &inner);
    assert!(outer.is_in(&inner));
}

/// What Btrfs gives each subvolume, which are one mount all the same.
#[test]
fn a_directory_of_another_device_than_its_parent_is_a_file_system() {
    let tree = Tree::new();
    let root = tree.root();
    let dir = fs::File::open(tree.dir.path()).unwrap();
    let elsewhere = tree.seen(&root, Key { dev: root.key.dev + 1, ..root.key });
    for name in ["dir", "other"] {
        fs::create_dir(tree.dir.path().join(name)).unwrap();
    }
    fs::write(tree.dir.path().join("file"), b"").unwrap();
    let is_submount = |parent, name| {
        let found = tree.inodes.look_up(parent, dir.as_fd(), name).unwrap();
        (found.is_submount, found.is_alone)
    };
    // Found, and known already.
    for _ in 0..2 {
        assert_eq!(is_submount(&root, c"dir"), (false, false));
        assert_eq!(is_submount(&elsewhere, c"other"), (true, false));
        assert_eq!(is_submount(&elsewhere, c"file"), (false, false));
    }
}
