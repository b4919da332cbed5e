"""Subscribes by the SDK's gRPC extension, and can be invoked."""

import os

from dapr.clients.grpc._response import TopicEventResponse
from dapr.ext.grpc import App, InvokeMethodRequest, InvokeMethodResponse, SubscriptionMessage

import story

app = App()


@app.subscribe(pubsub_name='default', topic=story.TOPIC, dead_letter_topic=story.DEAD)
def placed(event: SubscriptionMessage) -> TopicEventResponse:
    extra = {'id': event.id(), 'note': event.extensions().get('note')}
    return TopicEventResponse(story.verdict(event.topic(), event.data()['text'], **extra))


@app.subscribe(pubsub_name='default', topic=story.DEAD)
def dead(event: SubscriptionMessage) -> None:
    story.verdict(event.topic(), event.data()['text'], id=event.id())


@app.method(name='hello')
def hello(request: InvokeMethodRequest) -> InvokeMethodResponse:
    answer = InvokeMethodResponse(
        f'{request.text()} with {request.content_type} and {request.metadata.get("x-note", [None])[0]}',
        'text/plain; charset=UTF-8',
    )
    answer.headers = (('x-answer', 'yes'),)
    return answer


app.register_health_check(lambda: story.note(health=True))
app.run(int(os.environ['APP_PORT']), listen_address='127.0.0.1')
