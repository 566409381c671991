//! Deadlines and the bandwidth cap, by a clock of their own.

use super::*;
use crate::testing::Time;

/// Takes everything at once, and has nothing to say.
struct Peer(Time);

impl Read for Peer {
    fn read(&mut self, _into: &mut [u8]) -> io::Result<usize> {
        self.0.sleep(Duration::from_millis(100));
        Err(io::ErrorKind::WouldBlock.into())
    }
}

impl Write for Peer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn channel() -> Channel {
    let time = Time::default();
    Channel::new(Peer(time.clone()), time)
}

#[test]
fn a_cap_gives_way_to_the_end_of_the_time() {
    let mut channel = channel();
    channel.set_bandwidth(Some(1000));
    let mut poll = || Flow::Continue;
    let mut wait = Wait::new(Duration::from_secs(10), &mut poll).until(Duration::from_secs(3));
    let ping = Message::Ping(1, 500);
    let sent = (0..100).find_map(|_| channel.send(&ping, &mut wait).err());
    assert!(matches!(sent, Some(ChannelError::Overdue)), "{sent:?}");
    assert_eq!(channel.now(), Duration::from_secs(3));
}

#[test]
fn a_peer_that_takes_everything_does_not_go_beyond_the_time() {
    let mut channel = channel();
    let mut poll = || Flow::Continue;
    let mut wait = Wait::new(Duration::from_secs(10), &mut poll).until(Duration::from_secs(3));
    let mut send = |channel: &mut Channel| channel.send(&Message::Ping(1, 500), &mut wait);
    send(&mut channel).unwrap();
    channel.sleep(Duration::from_secs(3));
    let sent = channel.sent_bytes();
    assert!(matches!(send(&mut channel), Err(ChannelError::Overdue)));
    assert_eq!(channel.sent_bytes(), sent);
}

#[test]
fn only_a_peer_that_kept_still_is_blamed() {
    for (before, blamed) in [(0, true), (2900, false)] {
        let mut channel = channel();
        channel.sleep(Duration::from_millis(before));
        let mut poll = || Flow::Continue;
        let mut wait = Wait::new(Duration::from_secs(10), &mut poll).until(Duration::from_secs(3));
        match channel.recv("a word", &mut wait) {
            Err(ChannelError::TimedOut { ms, .. }) => assert!(blamed && ms == 3000, "{ms}"),
            Err(ChannelError::Overdue) => assert!(!blamed),
            other => panic!("{other:?}"),
        }
    }
}
