//! The receiving half of a [`Channel`]: messages whole, page data straight into its place.

use super::{Channel, ChannelError, Flow, Wait};
use crate::chunk::{self, CHUNK_HEAD_LEN, ENTRY_LEN, Entry};
use crate::message::Message;
use crate::wire::{self, Checksum, HEAD_LEN, RecordHead, SUM_LEN, StreamKind, WireError, record};

const READ_BUFFER: usize = 64 << 10;

/// What arrived: a message, or the head of a record of pages whose data is to be fetched.
pub(crate) enum Incoming {
    Message(Message),
    Pages(Pages),
}

/// A `Pages` or `Pages2` record being received.
pub(crate) struct Pages {
    /// The record's type.
    pub(crate) kind: u32,
    pub(crate) space: u16,
    pub(crate) entries: Vec<Entry>,
    sum: Checksum,
}

impl Channel {
    /// Reads and checks the peer's preamble.
    pub(crate) fn recv_preamble(&mut self, wait: &mut Wait) -> Result<(), ChannelError> {
        let mut bytes = [0; wire::PREAMBLE_LEN];
        self.read_exact(&mut bytes, wait)?;
        Ok(wire::check_preamble(&bytes, StreamKind::Live)?)
    }

    /// Receives the next message; `Failed`, `Refused` and `Cancel` become [`ChannelError::Peer`].
    pub(crate) fn recv(
        &mut self,
        expected: &'static str,
        wait: &mut Wait,
    ) -> Result<Message, ChannelError> {
        match self.recv_any(wait)? {
            Incoming::Message(message) => Ok(message),
            Incoming::Pages(pages) => {
                let found = wire::record_name(pages.kind);
                Err(ChannelError::Unexpected { peer: self.peer, found, expected })
            }
        }
    }

    /// As [`Channel::recv`]; a record of pages is given with its table read, its data to be fetched.
    pub(crate) fn recv_any(&mut self, wait: &mut Wait) -> Result<Incoming, ChannelError> {
        loop {
            let mut bytes = [0; HEAD_LEN];
            self.read_exact(&mut bytes, wait)?;
            let head = RecordHead::decode(bytes)?;
            if [record::PAGES, record::PAGES2].contains(&head.kind) {
                return self.recv_table(head, wait).map(Incoming::Pages);
            }
            let mut body = std::mem::take(&mut self.body);
            body.resize(head.body_len(), 0);
            let result = self.read_exact(&mut body, wait).and_then(|()| {
                let mut sum = Checksum::new(head);
                sum.update(&body);
                self.finish(head.kind, sum, wait)?;
                Ok(Message::parse(head.kind, &body))
            });
            body.clear();
            body.shrink_to(READ_BUFFER);
            self.body = body;
            match result? {
                // Who sends nothing else keeps nobody from being asked.
                Err(WireError::UnknownRecord { .. }) if head.optional => {
                    if wait.ask() == Flow::Cancel {
                        return Err(ChannelError::Cancelled);
                    }
                }
                Ok(Message::Failed(r) | Message::Refused(r) | Message::Cancel(r)) => {
                    return Err(ChannelError::Peer(self.peer, r.reasons));
                }
                message => return Ok(Incoming::Message(message?)),
            }
        }
    }

    fn recv_table(&mut self, head: RecordHead, wait: &mut Wait) -> Result<Pages, ChannelError> {
        let bad = |what| WireError::Malformed { kind: head.kind, what };
        let mut sum = Checksum::new(head);
        let mut left = head.body_len();
        let mut bytes = [0; CHUNK_HEAD_LEN];
        left = left.checked_sub(CHUNK_HEAD_LEN).ok_or(bad("no head"))?;
        self.read_exact(&mut bytes, wait)?;
        sum.update(&bytes);
        let (space, runs) = chunk::decode_head(bytes)?;
        left = left.checked_sub(runs * ENTRY_LEN).ok_or(bad("table cut short"))?;
        let mut entries = Vec::with_capacity(runs);
        for _ in 0..runs {
            let mut bytes = [0; ENTRY_LEN];
            self.read_exact(&mut bytes, wait)?;
            sum.update(&bytes);
            let entry = chunk::decode_entry(bytes)?;
            left = left.checked_sub(entry.len).ok_or(bad("more data than the record has"))?;
            entries.push(entry);
        }
        if left != 0 {
            return Err(bad("data of no run").into());
        }
        Ok(Pages { kind: head.kind, space, entries, sum })
    }

    /// Fetches a run's data into place.
    pub(crate) fn recv_data(
        &mut self,
        pages: &mut Pages,
        mut into: &mut [u8],
        wait: &mut Wait,
    ) -> Result<(), ChannelError> {
        // The checksum is taken while the bytes are still in the cache.
        while !into.is_empty() {
            let count = self.read_some(into, wait)?;
            let (done, rest) = into.split_at_mut(count);
            pages.sum.update(done);
            into = rest;
        }
        Ok(())
    }

    /// Checks the checksum behind a record of pages.
    pub(crate) fn recv_pages_end(
        &mut self,
        pages: Pages,
        wait: &mut Wait,
    ) -> Result<(), ChannelError> {
        self.finish(pages.kind, pages.sum, wait)
    }

    fn finish(&mut self, kind: u32, sum: Checksum, wait: &mut Wait) -> Result<(), ChannelError> {
        let mut found = [0; SUM_LEN];
        self.read_exact(&mut found, wait)?;
        let sum = sum.value();
        if sum != u32::from_le_bytes(found) {
            return Err(WireError::Checksum { kind }.into());
        }
        self.received_digest.add(sum);
        Ok(())
    }

    fn read_exact(&mut self, mut into: &mut [u8], wait: &mut Wait) -> Result<(), ChannelError> {
        while !into.is_empty() {
            let count = self.read_some(into, wait)?;
            into = &mut into[count..];
        }
        Ok(())
    }

    /// At least one byte: from the buffer if it holds any, else straight from the transport if much is
    /// wanted, else by way of the buffer.
    fn read_some(&mut self, into: &mut [u8], wait: &mut Wait) -> Result<usize, ChannelError> {
        if self.incoming_at < self.incoming.len() {
            let count = into.len().min(self.incoming.len() - self.incoming_at);
            into[..count].copy_from_slice(&self.incoming[self.incoming_at..][..count]);
            self.incoming_at += count;
            return Ok(count);
        }
        if into.len() >= READ_BUFFER {
            return self.read_io(into, wait);
        }
        let mut buffer = std::mem::take(&mut self.incoming);
        buffer.resize(READ_BUFFER, 0);
        let result = self.read_io(&mut buffer, wait);
        buffer.truncate(*result.as_ref().unwrap_or(&0));
        (self.incoming, self.incoming_at) = (buffer, 0);
        result?;
        self.read_some(into, wait)
    }

    fn read_io(&mut self, into: &mut [u8], wait: &mut Wait) -> Result<usize, ChannelError> {
        let start = self.now();
        loop {
            match self.io.read(into) {
                Ok(0) => return Err(ChannelError::Closed(self.peer)),
                Ok(count) => {
                    self.received_bytes += count as u64;
                    return self.late(wait, start, self.now()).map_or(Ok(count), Err);
                }
                Err(e) => {
                    if let Some(error) = self.trouble(e, start, wait) {
                        return Err(error);
                    }
                }
            }
        }
    }
}
