use duet_events::Event;
use futures::StreamExt as _;

use super::*;

const MIB: usize = 1 << 20;

fn work(id: u64, bytes: usize) -> Work {
    let event = Event::new(id.to_string(), "/s", "t").unwrap().with_data(vec![0; bytes]);
    let delivery = Delivery { id, position: id, attempt: 1, generation: 0, event, path: None };
    Work { token: id.to_string(), deliveries: vec![delivery] }
}

fn stream() -> (Stream, Events) {
    let (down, events) = down::new(65);
    let spec = SubscriptionSpec::new("shop/a", "default", "news").unwrap();
    (Stream::new(spec, down, Extensions::default()), events)
}

/// Sizes of the events that wait to be read.
fn read(events: &mut Events) -> Vec<usize> {
    let mut sizes = Vec::new();
    while let Some(Some(message)) = events.next().now_or_never() {
        let Some(Said::EventMessage(event)) = message.unwrap().subscribe_topic_events_response_type
        else {
            panic!("an event");
        };
        sizes.push(event.data.len());
    }
    sizes
}

#[tokio::test]
async fn what_waits_to_be_read_is_bounded_in_bytes() {
    let (stream, mut events) = stream();
    // The fortieth is larger than all the room there is.
    let sizes: Vec<usize> = (0..64).map(|n| if n == 40 { 20 * MIB } else { MIB }).collect();
    let works: Vec<_> = (0..).zip(&sizes).map(|(id, bytes)| work(id, *bytes)).collect();
    let mut answers = vec![Vec::new(); works.len()];
    let delivering = works.iter().zip(&mut answers);
    let mut delivering: Vec<_> =
        delivering.map(|(work, answers)| stream.deliver(work, answers)).collect();
    let mut came = Vec::new();
    while came.len() < sizes.len() {
        for one in &mut delivering {
            assert!(one.now_or_never().is_none(), "nothing is answered");
        }
        let waiting = read(&mut events);
        let bytes: usize = waiting.iter().sum();
        assert!(bytes <= 16 * MIB || waiting == [20 * MIB], "{waiting:?}");
        assert!(!waiting.is_empty(), "it goes on");
        came.extend(waiting);
    }
    assert_eq!(came, sizes, "in their order");
}

#[tokio::test]
async fn what_waits_for_room_goes_back_when_the_application_leaves() {
    let (stream, _events) = stream();
    let (first, second) = (work(1, 16 * MIB), work(2, MIB));
    let (mut none, mut answers) = (Vec::new(), Vec::new());
    let mut one = stream.deliver(&first, &mut none);
    assert!((&mut one).now_or_never().is_none());
    let mut two = stream.deliver(&second, &mut answers);
    assert!((&mut two).now_or_never().is_none());
    stream.release();
    two.await;
    assert_eq!(answers, [AppAnswer::NotReached]);
}
