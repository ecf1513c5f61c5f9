//! Opens a file, standard input or a compressed file as a stream of bytes; packs bytes.

use std::fs::File;
use std::io::{BufRead, BufReader, Chain, Cursor, Error as IoError, ErrorKind, Read, Result as IoResult};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use crate::error::{Error, Result};

/// `content` as a frame of zstd; frames may follow each other in a file.
#[must_use]
pub fn zstd_frame(content: &[u8]) -> Vec<u8> {
    compress_to_vec(content, CompressionLevel::Fastest)
}

/// Bytes read at once.
const BUFFER: usize = 1 << 18;

/// How a file's bytes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// The bytes of `path` after unpacking; `-` is standard input. `taken` counts the bytes that were read before unpacking.
pub(crate) fn open(
    path: &Path,
    packing: Packing,
    taken: Arc<AtomicU64>,
) -> Result<Box<dyn BufRead + Send + Sync>> {
    if path == Path::new("-") {
        let input = Counted { inner: std::io::stdin(), taken };
        return Ok(Box::new(BufReader::with_capacity(BUFFER, input)));
    }
    let file = File::open(path).map_err(|source| io_error(path, source))?;
    if file.metadata().is_ok_and(|m| m.is_dir()) {
        return Err(Error::Directory { path: path.to_owned() });
    }
    let file = BufReader::with_capacity(BUFFER, Counted { inner: file, taken });
    Ok(match packing {
        Packing::Plain => Box::new(file),
        Packing::Gzip => Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(file))),
        Packing::Zstd => Box::new(BufReader::with_capacity(BUFFER, Frames { file: Some(file), frame: None })),
    })
}

/// An error of the operating system while a plain file is opened or read.
pub(crate) fn io_error(path: &Path, source: IoError) -> Error {
    let path = path.to_owned();
    match source.kind() {
        ErrorKind::NotFound => Error::Missing { path },
        _ => Error::Io { path, source },
    }
}

/// Counts what is read.
struct Counted<R> {
    inner: R,
    taken: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, out: &mut [u8]) -> IoResult<usize> {
        let count = self.inner.read(out)?;
        self.taken.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

type Compressed = BufReader<Counted<File>>;
/// A frame, of which the magic number was read already.
type Frame = StreamingDecoder<Chain<Cursor<[u8; 4]>, Compressed>, FrameDecoder>;

/// Magic numbers of frames to be skipped have these upper bits. Source: RFC 8878, section 3.1.2.
const SKIPPABLE: u32 = 0x184D_2A50;

/// The frames of a zstd file one after another, each with its checksum compared where it has one. Frames that hold no
/// text, which parallel compressors and seekable files have, are skipped.
struct Frames {
    /// Between frames: the file.
    file: Option<Compressed>,
    /// Within a frame: its decoder.
    frame: Option<Frame>,
}

impl Read for Frames {
    fn read(&mut self, out: &mut [u8]) -> IoResult<usize> {
        loop {
            if let Some(mut frame) = self.frame.take() {
                let count = frame.read(out)?;
                if count > 0 || out.is_empty() {
                    self.frame = Some(frame);
                    return Ok(count);
                }
                let stored = frame.decoder.get_checksum_from_data();
                if stored.is_some() && stored != frame.decoder.get_calculated_checksum() {
                    return Err(IoError::new(ErrorKind::InvalidData, "a checksum differs"));
                }
                self.file = Some(frame.into_inner().into_inner().1);
            }
            let Some(mut file) = self.file.take() else { return Ok(0) };
            if file.fill_buf()?.is_empty() {
                return Ok(0);
            }
            let magic = word(&mut file)?;
            if u32::from_le_bytes(magic) & !0xF == SKIPPABLE {
                let length = u64::from(u32::from_le_bytes(word(&mut file)?));
                if std::io::copy(&mut file.by_ref().take(length), &mut std::io::sink())? < length {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                self.file = Some(file);
            } else {
                let frame = StreamingDecoder::new(Cursor::new(magic).chain(file));
                self.frame = Some(frame.map_err(IoError::other)?);
            }
        }
    }
}

fn word(file: &mut impl Read) -> IoResult<[u8; 4]> {
    let mut bytes = [0; 4];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}
