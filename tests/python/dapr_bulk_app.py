"""Subscribes with bulk delivery, on the SDK's own stubs: its gRPC extension has no handler for that."""

import json
import os
from concurrent import futures

import grpc
from dapr.proto.runtime.v1 import appcallback_pb2 as messages
from dapr.proto.runtime.v1 import appcallback_pb2_grpc as callback

import story

WORDS = {'success': 0, 'retry': 1, 'drop': 2}


class Application(callback.AppCallbackServicer):
    def ListTopicSubscriptions(self, request, context):
        bulk = messages.BulkSubscribeConfig(enabled=True, max_messages_count=10, max_await_duration_ms=200)
        orders = messages.TopicSubscription(
            pubsub_name='default', topic=story.TOPIC, dead_letter_topic=story.DEAD, bulk_subscribe=bulk)
        dead = messages.TopicSubscription(pubsub_name='default', topic=story.DEAD)
        return messages.ListTopicSubscriptionsResponse(subscriptions=[orders, dead])

    def OnBulkTopicEvent(self, request, context):
        story.note(entries=len(request.entries))
        answer = messages.TopicEventBulkResponse()
        for entry in request.entries:
            event = entry.cloud_event
            extra = {'id': event.id, 'note': event.extensions['note']}
            word = story.verdict(request.topic, json.loads(event.data)['text'], **extra)
            answer.statuses.add(entry_id=entry.entry_id, status=WORDS[word])
        return answer

    def OnTopicEvent(self, request, context):
        word = story.verdict(request.topic, json.loads(request.data)['text'], id=request.id)
        return messages.TopicEventResponse(status=WORDS[word])


def serve(add):
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    add(server)
    server.add_insecure_port(f'127.0.0.1:{os.environ["APP_PORT"]}')
    server.start()
    server.wait_for_termination()


if __name__ == '__main__':
    serve(lambda server: callback.add_AppCallbackServicer_to_server(Application(), server))
