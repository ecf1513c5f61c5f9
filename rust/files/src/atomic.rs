//! Files and directories that appear complete or not at all.
//!
//! Everything is prepared under a temporary name beside its target (same directory, hence same file system), flushed
//! to disk, and then renamed, which POSIX makes atomic. The parent directory is flushed last, so that the rename itself
//! outlives a power cut. Temporary names start with `.` and end in `.partial`; a killed process can leave one behind,
//! a returning one cannot.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// Writes `bytes` to `path`: afterwards the file holds all of them, or what it held before. A symbolic link at `path`
/// is replaced, not followed.
///
/// # Errors
/// [`Error::Io`] naming the step that failed; the temporary file is removed.
pub fn write_file(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    write_file_with(path, |file| file.write_all(bytes))
}

/// As [`write_file`], for contents produced piece by piece.
///
/// # Errors
/// [`Error::Io`] naming the step that failed, `write`'s own error included; the temporary file is removed.
pub fn write_file_with(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let name = name_beside(path)?;
    let file =
        OpenOptions::new().write(true).create_new(true).open(&name).map_err(Error::io("create", &name))?;
    let temporary = Temporary { path: name };
    let mut writer = BufWriter::new(file);
    write(&mut writer)
        .and_then(|()| writer.flush())
        .and_then(|()| writer.get_ref().sync_all())
        .map_err(Error::io("write", path))?;
    drop(writer);
    fs::rename(&temporary.path, path).map_err(Error::io("move the finished file to", path))?;
    sync_directory(parent_of(path))
}

/// A directory under construction, which takes its final name only on [`AtomicDir::commit`].
///
/// Dropped without a commit, it removes everything written into it.
#[derive(Debug)]
pub struct AtomicDir {
    target: PathBuf,
    temporary: Temporary,
}

impl AtomicDir {
    /// Creates an empty directory beside `target`, whose parent must exist.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be created.
    pub fn new(target: impl AsRef<Path>) -> Result<Self> {
        let target = target.as_ref().to_owned();
        let path = name_beside(&target)?;
        fs::create_dir(&path).map_err(Error::io("create", &path))?;
        Ok(Self { target, temporary: Temporary { path } })
    }

    /// Where to write the contents meanwhile.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.temporary.path
    }

    /// Flushes all contents to disk and gives the directory its final name.
    ///
    /// With `replace`, a directory that stands there moves aside first and is removed after the new one is in place;
    /// it returns to its place if that fails. (A crash between the two renames leaves it under a name
    /// `.NAME.….partial` beside the target.)
    ///
    /// # Errors
    /// [`Error::Exists`] if the target exists and `replace` is false; [`Error::Io`] otherwise. The target is
    /// then as it was and the temporary directory is removed (if only the last flush fails, the new one is in place).
    pub fn commit(self, replace: bool) -> Result<()> {
        sync_tree(&self.temporary.path)?;
        let occupied = fs::symlink_metadata(&self.target).is_ok();
        if occupied && !replace {
            return Err(Error::Exists { path: self.target });
        }
        let parent = parent_of(&self.target);
        if occupied {
            let aside = name_beside(&self.target)?;
            fs::rename(&self.target, &aside).map_err(Error::io("move aside", &self.target))?;
            let aside = Temporary { path: aside };
            if let Err(source) = fs::rename(&self.temporary.path, &self.target) {
                let restored = fs::rename(&aside.path, &self.target);
                if restored.is_err() {
                    // The only copy must not be cleaned away.
                    std::mem::forget(aside);
                }
                return Err(Error::Io { action: "replace", path: self.target, source });
            }
            // The new directory must be on disk before the old one goes.
            sync_directory(parent)?;
            drop(aside);
            return Ok(());
        }
        fs::rename(&self.temporary.path, &self.target)
            .map_err(Error::io("move the finished directory to", &self.target))?;
        sync_directory(parent)
    }
}

/// Something this process made, of which nothing is left under `path` when this is dropped: it is removed, unless it
/// was renamed.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
}

/// A name beside `target` that nobody else uses: processes of several containers may share a directory and even their
/// numbers, so the clock takes part.
fn name_beside(target: &Path) -> Result<PathBuf> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = target.file_name().ok_or_else(|| Error::Io {
        action: "write to",
        path: target.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name"),
    })?;
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let nanoseconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}-{count}-{nanoseconds:x}.partial", std::process::id()));
    Ok(target.with_file_name(temporary))
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Nothing useful can be done about a failing clean-up: the error that led here is the one to report.
        let _ = match fs::symlink_metadata(&self.path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&self.path),
            Ok(_) => fs::remove_file(&self.path),
            Err(_) => Ok(()),
        };
    }
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Flushes every file and directory under `root`, contents before their directory.
fn sync_tree(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root).map_err(Error::io("list", root))? {
        let entry = entry.map_err(Error::io("list", root))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io("inspect", &path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            // Flushing needs a writable handle on some systems.
            let file = OpenOptions::new().append(true).open(&path).or_else(|_| File::open(&path));
            file.and_then(|file| file.sync_all()).map_err(Error::io("flush", &path))?;
        }
    }
    sync_directory(root)
}

/// Flushes a directory's entries; only Unix lets a directory be opened for that.
fn sync_directory(path: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(path).and_then(|directory| directory.sync_all()).map_err(Error::io("flush", path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        write_file(&path, b"first").unwrap();
        write_file(&path, b"second, longer").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second, longer");
        assert_eq!(names(directory.path()), ["state.json"]);
    }

    #[test]
    fn a_failing_writer_leaves_the_old_file_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        write_file(&path, b"old").unwrap();
        let error = write_file_with(&path, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("disk full"))
        })
        .unwrap_err();
        assert!(
            error.to_string().contains("state.json") && error.to_string().contains("disk full"),
            "{error}"
        );
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(directory.path()), ["state.json"]);
    }

    #[test]
    fn a_panicking_writer_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let result = std::panic::catch_unwind(|| write_file_with(&path, |_| panic!("mid-way")));
        assert!(result.is_err());
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn bad_targets_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(write_file("/", b""), Err(Error::Io { .. })));
        assert!(matches!(write_file(directory.path().join("no/such/place"), b""), Err(Error::Io { .. })));
        assert!(matches!(AtomicDir::new(directory.path().join("no/such/place")), Err(Error::Io { .. })));
        // A directory stands where the file should go.
        fs::create_dir_all(directory.path().join("taken/inside")).unwrap();
        assert!(write_file(directory.path().join("taken"), b"x").is_err());
        assert_eq!(names(directory.path()), ["taken"]);
    }

    #[test]
    fn a_directory_appears_on_commit_only() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("run");
        let build = AtomicDir::new(&target).unwrap();
        fs::create_dir(build.path().join("sub")).unwrap();
        fs::write(build.path().join("sub/a"), b"1").unwrap();
        assert!(!target.exists());
        build.commit(false).unwrap();
        assert_eq!(fs::read(target.join("sub/a")).unwrap(), b"1");
        assert_eq!(names(directory.path()), ["run"]);
    }

    #[test]
    fn an_abandoned_directory_vanishes() {
        let directory = tempfile::tempdir().unwrap();
        let build = AtomicDir::new(directory.path().join("run")).unwrap();
        fs::write(build.path().join("a"), b"1").unwrap();
        drop(build);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn replacing_is_refused_unless_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("run");
        for (content, replace) in [("1", false), ("2", true)] {
            let build = AtomicDir::new(&target).unwrap();
            fs::write(build.path().join(content), content).unwrap();
            build.commit(replace).unwrap();
        }
        assert_eq!(names(&target), ["2"]);
        let build = AtomicDir::new(&target).unwrap();
        assert!(matches!(build.commit(false), Err(Error::Exists { .. })));
        assert_eq!(names(&target), ["2"]);
        assert_eq!(names(directory.path()), ["run"]);
    }
}
