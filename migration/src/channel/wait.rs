//! What a wait for the peer is bounded by.

use std::time::Duration;

use super::Flow;

/// How long the peer may keep still, when everything has to be over, and who is asked meanwhile.
pub struct Wait<'a> {
    pub(super) still: Duration,
    pub(super) until: Option<Duration>,
    poll: &'a mut dyn FnMut() -> Flow,
}

impl<'a> Wait<'a> {
    /// The peer may keep still for at most `still`; `poll` is asked while nothing moves.
    pub fn new(still: Duration, poll: &'a mut dyn FnMut() -> Flow) -> Self {
        Self { still, until: None, poll }
    }

    /// All of it may take so long from now on, whatever moves; and the peer may keep still for as long.
    pub fn within(limit: Duration, now: Duration, poll: &'a mut dyn FnMut() -> Flow) -> Self {
        Self::new(limit, poll).until(now.saturating_add(limit))
    }

    /// Everything has to be over by `until` on the channel's clock, whatever moves.
    #[must_use]
    pub fn until(self, until: Duration) -> Self {
        Self { until: Some(until), ..self }
    }

    /// Asks whoever is to be asked.
    pub(crate) fn ask(&mut self) -> Flow {
        (self.poll)()
    }

    /// Whether everything has to be over by now.
    pub(super) fn is_over(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| now >= until)
    }
}
