//! Who gets which event of those that a hub holds.

use super::super::held::Stage;
use super::super::settle;
use super::{Hub, Member, now_ms};
use crate::bus::{Delivery, Settle};

impl Hub {
    /// Hands out what may go, as far as there is room.
    pub(super) fn hand_out(&mut self) {
        if self.barrier.is_some() || self.paused {
            return;
        }
        while let Some(position) = self.hands.next() {
            let free = |member: &Member| member.credit.saturating_sub(member.open.len());
            let member = self.members.iter_mut().max_by_key(|(_, member)| free(member));
            let Some((id, member)) = member.filter(|(_, member)| free(member) > 0) else { return };
            let Some(held) = self.hands.get(position) else { return };
            if held.event.expires_ms().is_some_and(|at| at <= now_ms()) {
                self.expire(position);
                continue;
            }
            self.next_delivery += 1;
            let delivery = Delivery {
                id: self.next_delivery,
                position,
                attempt: held.attempt,
                generation: self.generation,
                event: held.event.clone(),
                path: None,
            };
            let id = *id;
            if member.out.try_send(Ok(delivery)).is_err() {
                // It is gone; what it settled before is still on the way, and its word comes after that.
                member.credit = 0;
                continue;
            }
            member.open.insert(self.next_delivery, (self.turn, position));
            self.hands.set(position, Stage::Out(id));
        }
    }

    fn expire(&mut self, position: u64) {
        self.shared.metrics.expired(&self.spec.name);
        if let Some(held) = self.hands.get(position) {
            let (attempt, event) = (held.attempt, held.event.clone());
            let job = settle::Job { attempt, ..self.job(position, held.reply.clone()) };
            self.hands.set(position, Stage::Busy);
            self.write(job, event, Settle::Ack);
        }
    }
}
