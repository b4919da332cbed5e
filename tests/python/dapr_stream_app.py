"""Subscribes by the SDK's streams: no port of its own."""

import threading

from dapr.clients import DaprClient
from dapr.clients.grpc._response import TopicEventResponse

import story


def placed(message):
    extra = {'id': message.id(), 'note': message.extensions().get('note')}
    return TopicEventResponse(story.verdict(message.topic(), message.data()['text'], **extra))


def dead(client):
    subscription = client.subscribe(pubsub_name='default', topic=story.DEAD)
    story.note(open=True)
    for message in subscription:
        story.verdict(message.topic(), message.data()['text'], id=message.id())
        subscription.respond_success(message)


with DaprClient() as client:
    client.subscribe_with_handler(
        pubsub_name='default', topic=story.TOPIC, handler_fn=placed, dead_letter_topic=story.DEAD
    )
    story.note(open=True)
    threading.Thread(target=dead, args=(client,), daemon=True).start()
    threading.Event().wait()
